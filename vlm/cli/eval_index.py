"""Compare approximate search with exact search: recall, time, size and the cost in R@1."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import ArgumentParser
from numpy.typing import NDArray

from vlm.data.benchmarks.opening import open_benchmark
from vlm.data.manifest import is_data_folder
from vlm.embedder import Embedder
from vlm.errors import ConfigError, DataError, SearchIndexError
from vlm.files import write_file
from vlm.markdown import markdown_table
from vlm.reports.index_plot import recall_latency_png
from vlm.retrieval.index_cases import BATCH, SearchCase, cases_of
from vlm.retrieval.index_sweep import Comparison, SweepPoint, compare_all, loss_of, sweep
from vlm.retrieval.pairs import pairs_of_benchmark, pairs_of_split
from vlm.retrieval.protocol import questions_of
from vlm.search.approximate import ApproximateIndex
from vlm.search.embeddings import DESCRIPTION_NAME, read_embeddings
from vlm.search.index_choice import AUTO

_KS = (1, 5, 10)
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class _Vectors(NamedTuple):
    """What is searched with and in."""

    images: NDArray[np.float32]
    texts: Mapping[str, tuple[NDArray[np.float32], NDArray[np.int64]]]
    """By language: vectors, and pairs (text, picture) that belong together."""
    origin: Mapping[str, Any]


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval index`."""
    parser.add_argument(
        "source", type=Path, help="folder of a bundle, or one with embeddings of `vlm embed`"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data/emoji"),
        help="for a bundle: data folder, or the files of a published benchmark",
    )  # fmt: skip
    parser.add_argument("--split", type=str | None, default=None, help="split to search in")
    parser.add_argument(
        "--factory", nargs="+", default=[AUTO],
        help="strings for FAISS's index_factory such as HNSW32 or IVF64,SQ8, with @nprobe=8 where "
        "a parameter is not to be tuned; auto is chosen by size, memory and recall",
    )  # fmt: skip
    parser.add_argument(
        "--target_recall", type=float, default=0.95,
        help="share of the ten nearest neighbours to which search parameters are tuned",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=str, default="1GiB", help="what an index chosen by auto may take"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also measure each index over its search parameter"
    )
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out", type=Path | None, default=None,
        help="folder for index.json and, of a sweep, index.png",
    )  # fmt: skip


def run(options: Any) -> None:
    """Compare the indexes; print a table or JSON, and warn where one costs recall."""
    if not 0 < options.target_recall <= 1:
        raise ConfigError(
            f"target_recall is {options.target_recall}; expected more than 0 and up to 1"
        )
    memory = _bytes_in(options.memory)
    vectors = _vectors_of(options)
    cases = cases_of(vectors.images, vectors.texts, ks=_KS)
    comparisons: list[Comparison] = []
    curves: dict[str, dict[str, list[SweepPoint]]] = {}

    def also_sweep(index: ApproximateIndex, case: SearchCase) -> None:
        points = sweep(index, case, k=max(_KS))
        curves.setdefault(case.name, {})[comparisons[-1].factory] = points

    for comparison in compare_all(
        cases,
        options.factory,
        ks=_KS,
        target_recall=options.target_recall,
        memory_budget_bytes=memory,
        device=options.device,
        on_case=also_sweep if options.sweep else None,
    ):
        comparisons.append(comparison)
        _warn(comparison, options.target_recall)
    record = {
        **vectors.origin,
        "target_recall": options.target_recall,
        "timing": f"median of batches of {BATCH} queries, one thread, {max(_KS)} answers",
        "comparisons": [asdict(each) for each in comparisons],
        "sweep": {
            search: {factory: [asdict(p) for p in points] for factory, points in of_search.items()}
            for search, of_search in curves.items()
        },
    }
    text = json.dumps(record, indent=1)
    if options.out:
        write_file(options.out / "index.json", (text + "\n").encode())
        if curves:
            exact = {case.name: case.exact_milliseconds for case in cases}
            title = f"{len(vectors.images)} pictures, {vectors.images.shape[1]} numbers each"
            plot = recall_latency_png(curves, exact_milliseconds=exact, k=max(_KS), title=title)
            write_file(options.out / "index.png", plot)
    print(text if options.json else format_comparisons(comparisons))


def format_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table with a row for each index, direction and language."""
    header = [
        "factory", "direction", "language", "exact R@1", "exact R@10",
        "index R@1", "index R@10",
        "ann_recall@10", "ms/query", "exact ms/query", "bytes/vector", "build s", "parameters",
    ]  # fmt: skip
    rows = []
    for each in comparisons:
        recalls = [of.get(k) for of in (each.exact_recall, each.index_recall) for k in (1, 10)]
        cells = ["-" if value is None else f"{value:.3f}" for value in recalls]
        parameters = " ".join(f"{name}={value:g}" for name, value in each.parameters.items())
        rows.append([
            each.factory, each.direction.replace("_", " "), each.language or "-", *cells,
            f"{each.ann_recall[10]:.3f}", f"{each.milliseconds_per_query:.4f}",
            f"{each.exact_milliseconds_per_query:.4f}", f"{each.bytes_per_vector:.0f}",
            f"{each.build_seconds:.3f}", parameters or "-",
        ])  # fmt: skip
    return markdown_table(header, rows, text_columns=3)


def _vectors_of(options: Any) -> _Vectors:
    if (options.source / DESCRIPTION_NAME).is_file():
        if options.split is not None:
            raise ConfigError(
                f"{options.source} holds embeddings, which have no split; expected none, or a "
                "bundle"
            )
        return _vectors_of_embeddings(options.source, options.device)
    embedder = Embedder.load(options.source, device=options.device)
    if is_data_folder(options.data):
        split = options.split or "test_style"
        pairs = pairs_of_split(options.data, split, languages=embedder.languages)
    else:
        benchmark = open_benchmark(options.data, split=options.split)
        found = {key: value for key, value in asdict(benchmark.findings).items() if value}
        print(f"{benchmark.name}: {found}", file=sys.stderr)
        pairs = pairs_of_benchmark(benchmark)
    texts = {
        language: (embedder.encode_text(of_language.texts), np.asarray(of_language.matches))
        for language, of_language in pairs.texts.items()
    }
    origin = {
        "bundle": str(options.source),
        "model": embedder.fingerprint,
        "data": str(options.data),
        "questions": {name: asked.fingerprint for name, asked in questions_of(pairs).items()},
    }
    return _Vectors(embedder.encode_image(pairs.images, show_progress_bar=True), texts, origin)


def _vectors_of_embeddings(folder: Path, device: str | None) -> _Vectors:
    """Read pictures' vectors, and embed their main captions with the model that made them."""
    description, images, metadata = read_embeddings(folder)
    columns = [name for name in metadata.column_names if name.startswith("caption_")]
    captions = {name.removeprefix("caption_"): metadata[name].to_pylist() for name in columns}
    captions = {language: texts for language, texts in captions.items() if any(texts)}
    origin = {"embeddings": str(folder), "model": description.fingerprint}
    if not captions and len(images) < 2:
        raise DataError(f"{folder} holds {len(images)} pictures and no captions to search with")
    if not captions:
        return _Vectors(images, {}, origin)
    embedder = Embedder.load(description.bundle, device=device)
    if embedder.fingerprint != description.fingerprint:
        raise SearchIndexError(
            f"the embeddings were made by another model ({description.fingerprint[:12]}) than is "
            f"in {description.bundle} now ({embedder.fingerprint[:12]})"
        )
    embedder = embedder.truncated(description.dim)
    texts = {}
    for language, of_pictures in captions.items():
        places = {
            text: place for place, text in enumerate(dict.fromkeys(filter(None, of_pictures)))
        }
        pairs = [(places[text], image) for image, text in enumerate(of_pictures) if text]
        texts[language] = (embedder.encode_text(list(places)), np.array(pairs, dtype=np.int64))
    return _Vectors(images, texts, origin)


def _warn(comparison: Comparison, target: float) -> None:
    if loss := loss_of(comparison):
        print(f"warning: {loss}", file=sys.stderr)
    if not comparison.reached_target:
        print(
            f"warning: no search parameter brings {comparison.factory} to a recall of {target} "
            f"in {comparison.search}; what does best is used",
            file=sys.stderr,
        )


def _bytes_in(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise ConfigError(f"memory is {text!r}; expected a size such as 512MiB or 2GB")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])
