"""Compare approximate search of stored embeddings with exact search: recall, time, size."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonargparse import ArgumentParser
from numpy.typing import NDArray

from vlm.bundle import is_bundle
from vlm.cli.evaluation_runs import add_output_arguments, check_folders, deliver
from vlm.cli.index_options import add_index_arguments, index_plan
from vlm.cli.processes import refuse_several_processes
from vlm.embedding.embedder import Embedder
from vlm.embedding.parts import DESCRIPTION_NAME, read_embeddings
from vlm.errors import ConfigError, DataError, SearchIndexError
from vlm.evaluation.config import IndexPlan
from vlm.evaluation.indexes import (
    IndexReport,
    compare_indexes,
    comparison_rows,
)
from vlm.markdown import markdown_table
from vlm.reports.index_report import index_document
from vlm.search.index import AUTO

_RECORD_NAME = "index.json"


class _Vectors(NamedTuple):
    """What is searched with and in."""

    images: NDArray[np.float32]
    texts: Mapping[str, tuple[NDArray[np.float32], NDArray[np.int64]]]
    """By language: vectors, and pairs (text, image) that belong together."""
    fingerprint: str
    """Of the model that made them."""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval index`."""
    parser.add_argument("embeddings", type=Path, help="folder that `vlm embed` wrote")
    add_index_arguments(parser, default=[AUTO])
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    add_output_arguments(parser, record_name=_RECORD_NAME)


def run(options: Any) -> None:
    """Compare the indexes; print a table or JSON, warn where one costs recall, write the report."""
    refuse_several_processes("eval index")
    check_folders(options)
    plan = index_plan(options) or IndexPlan()
    vectors = _vectors_of(options.embeddings, options.device)
    report = compare_indexes(vectors.images, vectors.texts, plan, device=options.device)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    origin = {"embeddings": str(options.embeddings), "model": vectors.fingerprint}
    deliver(
        options,
        origin | report.as_record(),
        record_name=_RECORD_NAME,
        document=lambda: index_document(
            report, embeddings=str(options.embeddings), model=vectors.fingerprint
        ),
        table=lambda: _table(report),
    )


def _vectors_of(folder: Path, device: str | None) -> _Vectors:
    """Read images' vectors, and embed their main captions with the model that made them."""
    if not (folder / DESCRIPTION_NAME).is_file() and is_bundle(folder):
        raise ConfigError(
            f"{folder} is a bundle; expected a folder that `vlm embed` wrote, or "
            f"`vlm eval retrieval {folder} --index`, which compares indexes of a benchmark"
        )
    description, images, metadata = read_embeddings(folder)
    columns = [name for name in metadata.column_names if name.startswith("caption_")]
    captions = {name.removeprefix("caption_"): metadata[name].to_pylist() for name in columns}
    captions = {language: texts for language, texts in captions.items() if any(texts)}
    if not captions and len(images) < 2:
        raise DataError(
            f"{folder} holds {len(images)} images and no captions to search with; expected "
            "captions, or at least 2 images"
        )
    if not captions:
        return _Vectors(images, {}, description.fingerprint)
    embedder = Embedder.load(description.bundle, device=device)
    if embedder.fingerprint != description.fingerprint:
        raise SearchIndexError(
            f"the embeddings in {folder} were made by another model "
            f"({description.fingerprint[:12]}) than is in {description.bundle} now "
            f"({embedder.fingerprint[:12]}); expected the same, so embed the images again"
        )
    embedder = embedder.truncated(description.dim)
    texts = {}
    for language, of_images in captions.items():
        places = {text: place for place, text in enumerate(dict.fromkeys(filter(None, of_images)))}
        pairs = [(places[text], image) for image, text in enumerate(of_images) if text]
        texts[language] = (embedder.encode_text(list(places)), np.array(pairs, dtype=np.int64))
    return _Vectors(images, texts, description.fingerprint)


def _table(report: IndexReport) -> str:
    header, rows = comparison_rows(report.comparisons)
    return markdown_table(header, rows, text_columns=2)
