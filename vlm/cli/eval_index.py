"""Compare approximate search of stored embeddings with exact search: recall, time, size."""

import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlm.cli.options import DeviceOptions, IndexOptions, refuse_several_processes
from vlm.errors import ConfigError, DataError, SearchIndexError
from vlm.evaluation.config import IndexPlan
from vlm.markdown import markdown_table


@dataclass(frozen=True)
class Options(IndexOptions, DeviceOptions):
    """What `vlm eval index` is given."""

    embeddings: Path
    """Folder that `vlm embed` wrote."""
    _: KW_ONLY
    index: tuple[str, ...] = ("auto",)
    """FAISS indexes to compare with exact search: strings for index_factory such as HNSW32 or
    IVF64,SQ8, with @nprobe=8 for a parameter that is not to be tuned; auto is chosen by size,
    memory and recall."""


_Texts: TypeAlias = Mapping[str, tuple[NDArray[np.float32], NDArray[np.int64]]]
"""By language: vectors, and pairs (text, image) that belong together."""


def run(options: Options) -> None:
    """Compare the indexes; print a table or JSON, warn where one costs recall, write the report."""
    refuse_several_processes("eval index")
    options.check_folders()
    plan = options.index_plan() or IndexPlan()
    from vlm.evaluation.indexes import compare_indexes
    from vlm.reports.index_report import comparison_rows, index_document

    images, texts, model = _vectors_of(options.embeddings, options.device)
    report = compare_indexes(images, texts, plan, device=options.device)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    origin = {"embeddings": str(options.embeddings), "model": model}
    options.deliver(
        origin | report.as_record(),
        record_name="index.json",
        document=lambda: index_document(report, **origin),
        table=lambda: markdown_table(*comparison_rows(report.comparisons), text_columns=2),
    )


def _vectors_of(folder: Path, device: str | None) -> tuple[NDArray[np.float32], _Texts, str]:
    """Read images' vectors, embed their main captions; return the model's fingerprint too."""
    from vlm.bundle import is_bundle
    from vlm.embedding.embedder import Embedder
    from vlm.embedding.parts import DESCRIPTION_NAME, read_embeddings

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
        return images, {}, description.fingerprint
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
    return images, texts, description.fingerprint
