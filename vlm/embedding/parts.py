"""Embeddings folders, in the layout that clip-retrieval and autofaiss read."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float32

from vlm.data.dataset import ShardedSplit
from vlm.embedding.embedder import Embedder
from vlm.errors import DataError, SearchIndexError
from vlm.files import write_folder
from vlm.images.decoding import ImageSource

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
DESCRIPTION_NAME = "embeddings.json"


class Image(NamedTuple):
    """One image to embed, with what a search shows of it."""

    uid: str
    source: ImageSource
    path: str
    """Where the file lies; empty for an image in a shard."""
    captions: Mapping[str, str]
    """The main caption by language; empty where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingsDescription:
    """Which model made the embeddings, and how many there are."""

    bundle: str
    """The bundle's folder."""
    fingerprint: str
    count: int
    dim: int


def images_in_folder(folder: Path) -> Iterator[Image]:
    """Give every JPEG, PNG and WebP below a folder, in the order of their paths.

    Raises:
        DataError: there is none, or no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with images")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    for path in paths:
        uid = path.relative_to(folder).as_posix()
        yield Image(uid, path, str(path.resolve()), {})


def images_in_split(folder: Path, split: str) -> Iterator[Image]:
    """Give every image of a data folder's split.

    Raises:
        DataError: the split cannot be read.
    """
    for sample in ShardedSplit(folder, split):
        captions = {language: texts[0] for language, texts in sample.captions.items()}
        yield Image(sample.uid, sample.image, "", captions)


def write_embeddings(
    embedder: Embedder,
    images: Iterable[Image],
    out: Path,
    *,
    bundle: Path,
    part_size: int = 100_000,
) -> EmbeddingsDescription:
    """Embed images into `out`, which must not exist, in parts of `part_size` images.

    Raises:
        DataError: `out` exists, or an image cannot be read.
    """
    if out.exists():
        raise DataError(f"{out} exists already; choose another folder for the embeddings")
    count, images = 0, iter(images)
    with write_folder(out) as temporary:
        (temporary / "img_emb").mkdir()
        (temporary / "metadata").mkdir()
        part = 0
        while chunk := list(islice(images, part_size)):
            vectors = embedder.encode_image(
                [image.source for image in chunk], show_progress_bar=True
            )
            _save_vectors(temporary / "img_emb" / f"img_emb_{part}.npy", vectors)
            table = _metadata_of(chunk, embedder.languages)
            pyarrow.parquet.write_table(table, temporary / "metadata" / f"metadata_{part}.parquet")
            count += len(chunk)
            part += 1
        description = EmbeddingsDescription(
            bundle=str(bundle.resolve()),
            fingerprint=embedder.fingerprint,
            count=count,
            dim=embedder.embed_dim,
        )
        _write_description(temporary, description)
    return description


def read_embeddings(
    folder: Path,
) -> tuple[EmbeddingsDescription, Float32[np.ndarray, "images dim"], pyarrow.Table]:
    """Read the vectors and the metadata of an embeddings folder.

    Raises:
        SearchIndexError: the folder is no embeddings folder, or its parts do not fit together.
    """
    path = folder / DESCRIPTION_NAME
    if not path.is_file():
        raise SearchIndexError(f"{folder} holds no embeddings: it has no {DESCRIPTION_NAME}")
    try:
        description = EmbeddingsDescription(**json.loads(path.read_text(encoding="utf-8")))
        vectors = np.concatenate(
            [np.load(part, allow_pickle=False) for part in _parts(folder / "img_emb", "npy")]
        )
        tables = [pyarrow.parquet.read_table(p) for p in _parts(folder / "metadata", "parquet")]
        metadata = pyarrow.concat_tables(tables)
    except (OSError, EOFError, LookupError, ValueError, TypeError) as error:
        raise SearchIndexError(f"the embeddings in {folder} cannot be read: {error}") from error
    expected = (description.count, description.dim)
    if vectors.shape != expected or metadata.num_rows != description.count:
        raise SearchIndexError(
            f"{folder} holds vectors of shape {vectors.shape} and {metadata.num_rows} rows of "
            f"metadata; expected shape {expected}"
        )
    return description, vectors, metadata


def _save_vectors(path: Path, vectors: Float32[np.ndarray, "images dim"]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    path.write_bytes(buffer.getbuffer())  # numpy's own writing hides why a disk refused it


def _parts(folder: Path, suffix: str) -> Sequence[Path]:
    return sorted(folder.glob(f"*.{suffix}"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))


def _metadata_of(images: Sequence[Image], languages: Sequence[str]) -> pyarrow.Table:
    columns = {
        "uid": [image.uid for image in images],
        "image_path": [image.path for image in images],
    }
    for language in languages:
        columns[f"caption_{language}"] = [image.captions.get(language, "") for image in images]
    return pyarrow.table(columns)


def _write_description(folder: Path, description: EmbeddingsDescription) -> None:
    record = {name: getattr(description, name) for name in description.__slots__}
    (folder / DESCRIPTION_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
