"""Score a bundle on retrieval in both directions and every language, and say what was asked."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from vlm.bundle import load_bundle
from vlm.data.benchmarks.opening import open_benchmark
from vlm.data.manifest import is_data_folder
from vlm.embedder import Embedder
from vlm.errors import ConfigError
from vlm.files import write_file
from vlm.retrieval.evaluation import evaluate_with_protocol, format_scores
from vlm.retrieval.pairs import RetrievalPairs, pairs_of_benchmark, pairs_of_split


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval retrieval`."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle to score")
    parser.add_argument(
        "--data", type=str, nargs="+", default=["data/emoji"], metavar="[NAME=]PATH",
        help="data folders, or the files of published benchmarks; a name is what scores are "
        "called by",
    )  # fmt: skip
    parser.add_argument("--split", type=str | None, default=None, help="split to score")
    parser.add_argument(
        "--languages", nargs="+", default=None, help="languages to ask in; default: all, of a data "
        "folder the bundle's",
    )  # fmt: skip
    parser.add_argument(
        "--where", nargs="+", default=[],
        help="for a data folder: conditions on samples, such as source=noto group!=flags",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path | None, default=None,
        help="for a benchmark: the folder of its pictures, where they are not beside its file",
    )  # fmt: skip
    parser.add_argument(
        "--duplicates", type=Literal["by id", "by string"], default="by id",
        help="for a benchmark: which pictures are right where several have the same caption",
    )  # fmt: skip
    parser.add_argument(
        "--lower_case", action="store_true",
        help="for a benchmark: captions in lower case, as Chinese-CLIP and M2-Encoder evaluate",
    )  # fmt: skip
    parser.add_argument(
        "--allowed_share", type=float, default=0.01,
        help="for a benchmark: share of pictures and captions that may be missing or damaged",
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
    named = _named(options.data, options.split)
    bundle = load_bundle(options.bundle)
    embedder = Embedder.of_bundle(bundle, device=options.device, truncate_dim=options.truncate_dim)
    records = {}
    for name, path in named.items():
        pairs, findings = _open(path, options, embedder)
        evaluation = evaluate_with_protocol(
            embedder, pairs, transform=bundle.preprocess_cfg, show_progress_bar=True
        )
        records[name] = evaluation.as_record() | findings
    text = json.dumps({"bundle": str(options.bundle), "benchmarks": records}, indent=1)
    if options.out:
        write_file(options.out, (text + "\n").encode())
    scores = {name: record["scores"] for name, record in records.items()}
    print(text if options.json else format_scores(scores))


def _named(data: list[str], split: str | None) -> dict[str, Path]:
    """Return paths by the names of their scores."""
    named: dict[str, Path] = {}
    for each in data:
        name, sign, path = each.partition("=")
        if not sign:
            name, path = "", each
        folder = is_data_folder(Path(path))
        name = name or (split or "test_style" if folder else Path(path).stem)
        if name in named:
            raise ConfigError(f"two benchmarks are called {name}; name them by NAME=PATH")
        named[name] = Path(path)
    return named


def _open(path: Path, options: Any, embedder: Embedder) -> tuple[RetrievalPairs, dict[str, Any]]:
    if is_data_folder(path):
        pairs = pairs_of_split(
            path,
            options.split or "test_style",
            languages=options.languages or embedder.languages,
            where=options.where,
        )
        return pairs, {}
    benchmark = open_benchmark(
        path, split=options.split, images=options.images, allowed_share=options.allowed_share
    )
    found = {key: value for key, value in asdict(benchmark.findings).items() if value}
    print(f"{benchmark.name}: {found}", file=sys.stderr)
    pairs = pairs_of_benchmark(
        benchmark,
        duplicates=options.duplicates,
        lower_case=options.lower_case,
        languages=options.languages or (),
    )
    return pairs, {"kind": benchmark.kind, "split": benchmark.split, "findings": found}
