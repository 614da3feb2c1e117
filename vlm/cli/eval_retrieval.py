"""Score a bundle on retrieval in both directions and every language."""

import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.embedder import Embedder
from vlm.files import write_file
from vlm.retrieval.evaluation import evaluate_retrieval, format_scores
from vlm.retrieval.pairs import pairs_of_split


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval retrieval`."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle to score")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="data folder")
    parser.add_argument("--split", type=str, default="test_style", help="split to score")
    parser.add_argument(
        "--languages", nargs="+", default=None, help="languages to ask in; default: the bundle's"
    )
    parser.add_argument(
        "--where", nargs="+", default=[],
        help="conditions on samples, such as source=noto group!=flags",
    )  # fmt: skip
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--truncate_dim", type=int | None, default=None,
        help="use the first so many numbers of each vector, where they were trained so",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path | None, default=None, help="also write the JSON here")


def run(options: Any) -> None:
    """Score the bundle; print a table or JSON."""
    embedder = Embedder.load(
        options.bundle, device=options.device, truncate_dim=options.truncate_dim
    )
    pairs = pairs_of_split(
        options.data,
        options.split,
        languages=options.languages or embedder.languages,
        where=options.where,
    )
    scores = evaluate_retrieval(embedder, pairs, show_progress_bar=True)
    text = json.dumps({f"{options.split}/{key}": value for key, value in scores.items()}, indent=1)
    if options.out:
        write_file(options.out, (text + "\n").encode())
    print(text if options.json else format_scores({options.split: scores}))
