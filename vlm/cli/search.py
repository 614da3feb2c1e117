"""Find the images of an index that are nearest to a text, in any language, or to an image."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.errors import VlmError
from vlm.search.search_index import Hit, SearchIndex, hits_as_records


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm search`."""
    parser.add_argument("index", type=Path, help="folder that `vlm index` wrote")
    parser.add_argument(
        "--text", type=str | None, default=None, help="what to look for, such as 一只猫"
    )
    parser.add_argument(
        "--image", type=Path | None, default=None, help="image to look for (instead of --text)"
    )
    parser.add_argument("--k", type=int, default=5, help="how many images to show")
    parser.add_argument(
        "--bundle", type=Path | None, default=None, help="the model's folder, if it has been moved"
    )
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON list with an object a hit"
    )


def run(options: Any) -> None:
    """Search; print the hits."""
    if (options.text is None) == (options.image is None):
        raise VlmError("vlm search needs either --text TEXT or --image FILE")
    if options.text == "":
        raise VlmError("--text is empty; expected what to look for")
    index = SearchIndex.open(options.index)
    embedder = index.load_embedder(options.bundle, device=options.device)
    if options.image:
        query = embedder.encode_image([options.image])
    else:
        query = embedder.encode_text([options.text])
    hits = index.search(query, options.k)
    if options.json:
        print(json.dumps(hits_as_records(hits), ensure_ascii=False, indent=1))
    else:
        print("\n".join(_line(hit) for hit in hits))


def _line(hit: Hit) -> str:
    captions = " / ".join(hit.captions.values())
    return f"{hit.rank:>3}  {hit.score:.3f}  {hit.path or hit.uid}" + f"  {captions}".rstrip()
