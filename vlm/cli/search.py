"""Find the images of an index that are nearest to a text, in any language, or to an image."""

import gc
import json
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.options import DeviceOptions
from vlm.errors import VlmError

if TYPE_CHECKING:
    from vlm.search.search_index import Hit


@dataclass(frozen=True)
class Options(DeviceOptions):
    """What `vlm search` is given."""

    index: Path
    """Folder that `vlm index` wrote."""
    _: KW_ONLY
    text: str | None = None
    """What to look for, such as 一只猫."""
    image: Path | None = None
    """Image to look for (instead of --text)."""
    k: int = 5
    """How many images to show."""
    bundle: Path | None = None
    """The model's folder, if it has been moved."""
    json: bool = False
    """Print one JSON list with an object per hit."""


def run(options: Options) -> None:
    """Search; print the hits."""
    if (options.text is None) == (options.image is None):
        raise VlmError("vlm search needs either --text TEXT or --image FILE")
    if options.text == "":
        raise VlmError("--text is empty; expected what to look for")
    # A quarter of a search was spent looking for garbage in the modules that it imports.
    gc.disable()
    from vlm.search.search_index import SearchIndex

    gc.freeze()
    gc.enable()
    index = SearchIndex.open(options.index)
    embedder = index.load_embedder(options.bundle, device=options.device)
    if options.image is not None:
        query = embedder.encode_image([options.image])
    else:
        query = embedder.encode_text([options.text or ""])
    hits = index.search(query, options.k)
    if options.json:
        print(json.dumps([asdict(hit) for hit in hits], ensure_ascii=False, indent=1))
    else:
        print("\n".join(_line(hit) for hit in hits))


def _line(hit: "Hit") -> str:
    captions = " / ".join(hit.captions.values())
    return f"{hit.rank:>3}  {hit.score:.3f}  {hit.path or hit.uid}" + f"  {captions}".rstrip()
