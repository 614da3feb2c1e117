"""Embeddings folders: vectors and metadata in parts, as clip-retrieval and autofaiss read them.

A part is written when it is embedded, and known by a key: a run that was ended goes on with what
is missing, or was made by another model or of other images.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from tqdm import tqdm

from vlm.data.config import SourceConfig
from vlm.data.image_folder import IMAGE_SUFFIXES, images_below
from vlm.data.source import open_source
from vlm.embedding.embedder import IMAGE_BATCH, Embedder
from vlm.errors import ConfigError, DataError, SearchIndexError, ShardError
from vlm.files import write_file
from vlm.images.decoding import ImageSource
from vlm.records.texts import as_text

DESCRIPTION_NAME = "embeddings.json"

# What a killed run loses. A multiple of the batch, so that vectors do not depend on it.
PART_SIZE = 64 * IMAGE_BATCH

_SHOWN = 5  # unreadable images that an error names


class ListedImage(NamedTuple):
    """One image to embed, with what a search shows of it."""

    uid: str
    source: ImageSource
    address: str
    """Its file, or FOLDER/SHARD#ROW."""
    captions: Mapping[str, str]
    """The main caption by language."""
    error: str = ""
    """Why it cannot be used, if it cannot."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingsDescription:
    """Which model made the embeddings, and how many there are."""

    bundle: str
    """The bundle's folder."""
    fingerprint: str
    count: int
    dim: int


class Written(NamedTuple):
    """What `write_embeddings` did."""

    description: EmbeddingsDescription
    unreadable: dict[str, str]
    """By the address of each image that was left out, why."""


class SplitImages:
    """Every image of a source, in the order of its shards."""

    def __init__(self, config: SourceConfig) -> None:
        self._samples = open_source(config)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[ListedImage]:
        places = ((s, row) for s, size in enumerate(self._samples.sizes) for row in range(size))
        for shard, row in places:
            try:
                sample = self._samples.at(shard, row)
            except ShardError:
                raise
            except DataError as error:
                address = self._samples.address(shard, row)
                yield ListedImage("", b"", address, {}, str(error))
                continue
            captions = {language: texts[0] for language, texts in sample.captions.items()}
            yield ListedImage(sample.uid, sample.image, sample.address, captions)


def images_in_folder(folder: Path) -> tuple[list[ListedImage], Counter[str]]:
    """Return the images below a folder, at least one, and how many entries are left out why."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one with images")
    found = images_below(folder)
    if not found.paths:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    images = [
        ListedImage(as_text(path.relative_to(folder)), path, as_text(path.resolve()), {})
        for path in found.paths
    ]
    return images, found.left_out


def write_embeddings(
    embedder: Embedder,
    images: Iterable[ListedImage],
    out: Path,
    *,
    bundle: Path,
    allowed_share: float = 0.01,
    part_size: int = PART_SIZE,
) -> Written:
    """Embed images into `out`; go on with what an earlier call that was ended left there.

    Args:
        embedder: The model.
        images: What to embed.
        out: New folder, or one that is not finished.
        bundle: The model's folder.
        allowed_share: Ratio of the images that may be left out as unreadable; one always, but
            with 0 none.
        part_size: Images in a part, a multiple of the batch.

    Raises:
        ConfigError: `allowed_share` is no ratio.
        DataError: `out` is finished already or holds something else; or too many images cannot be
            read: all others have been embedded then, and are not embedded again.
        VlmError: something cannot be written.
    """
    if not 0 <= allowed_share <= 1:
        raise ConfigError(f"allowed_share is {allowed_share}; expected a ratio in [0, 1]")
    if out.exists() and ((out / DESCRIPTION_NAME).exists() or not _is_begun(out)):
        raise DataError(f"{out} exists already; choose another folder for the embeddings")
    model = [embedder.fingerprint, embedder.embed_dim, list(embedder.languages)]
    total = len(images) if isinstance(images, Sized) else None
    count, number, unreadable, images = 0, 0, dict[str, str](), iter(images)
    with tqdm(total=total, unit="image", desc="embedding") as bar:
        while chunk := list(islice(images, part_size)):
            part = _Part(out, number, _key(model, chunk))
            rows, left_out = part.find() or part.write(*_embed(embedder, chunk), embedder.languages)
            unreadable |= left_out
            count += rows
            number += 1
            bar.update(len(chunk))
    _check_bound(out, unreadable, count, allowed_share)
    for name, suffix in (("img_emb", "npy"), ("metadata", "parquet")):
        for path in _parts(out / name, suffix)[number:]:  # an earlier run had more images
            path.unlink()
    description = EmbeddingsDescription(
        bundle=str(bundle.resolve()),
        fingerprint=embedder.fingerprint,
        count=count,
        dim=embedder.embed_dim,
    )
    record = json.dumps(asdict(description), indent=1) + "\n"
    write_file(out / DESCRIPTION_NAME, record.encode())  # last: it says that all parts are there
    return Written(description, unreadable)


def read_embeddings(
    folder: Path,
) -> tuple[EmbeddingsDescription, Float32[np.ndarray, "images dim"], pyarrow.Table]:
    """Read the vectors and the metadata of an embeddings folder.

    Raises:
        SearchIndexError: the folder holds no finished embeddings, or they are damaged.
    """
    path = folder / DESCRIPTION_NAME
    if not path.is_file():
        if _is_begun(folder):
            raise SearchIndexError(f"{folder} is not finished; expected `vlm embed` to run again")
        raise SearchIndexError(f"{folder} holds no embeddings: it has no {path.name}")
    try:
        description = EmbeddingsDescription(**json.loads(path.read_text(encoding="utf-8")))
        vectors = np.concatenate(
            [np.load(part, allow_pickle=False) for part in _parts(folder / "img_emb", "npy")]
        )
        tables = [pyarrow.parquet.read_table(p) for p in _parts(folder / "metadata", "parquet")]
        metadata = pyarrow.concat_tables([table.replace_schema_metadata() for table in tables])
    except (OSError, EOFError, LookupError, ValueError, TypeError) as error:
        raise SearchIndexError(f"the embeddings in {folder} cannot be read: {error}") from error
    expected = (description.count, description.dim)
    if vectors.shape != expected or metadata.num_rows != description.count:
        raise SearchIndexError(
            f"{folder} holds vectors of shape {vectors.shape} and {metadata.num_rows} rows of "
            f"metadata; expected shape {expected}"
        )
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise SearchIndexError(
            f"{(~finite).sum()} of the {len(vectors)} vectors in {folder} are not finite; the "
            "model's weights or the file are damaged"
        )
    return description, vectors, metadata


class _Part:
    """The two files of a part; the metadata is written last, and holds the key.

    Of a part that is there, both methods return its rows, and why each other image is left out.
    """

    def __init__(self, folder: Path, number: int, key: str) -> None:
        self.vectors = folder / "img_emb" / f"img_emb_{number}.npy"
        self.metadata = folder / "metadata" / f"metadata_{number}.parquet"
        self.key = key

    def find(self) -> tuple[int, dict[str, str]] | None:
        """Look for what an earlier run left here; None unless it is whole and has the key."""
        with suppress(OSError, EOFError, LookupError, ValueError):
            schema = pyarrow.parquet.read_metadata(self.metadata)
            record = json.loads(schema.metadata[b"vlm"])
            rows = len(np.load(self.vectors, allow_pickle=False, mmap_mode="r"))
            if record["key"] == self.key and rows == schema.num_rows:
                return rows, record["unreadable"]
        return None

    def write(
        self,
        images: Sequence[ListedImage],
        vectors: Float32[np.ndarray, "images dim"],
        unreadable: dict[str, str],
        languages: Sequence[str],
    ) -> tuple[int, dict[str, str]]:
        columns = {
            "uid": [image.uid for image in images],
            "image_path": [image.address for image in images],
        } | {
            f"caption_{language}": [image.captions.get(language, "") for image in images]
            for language in languages
        }
        record = json.dumps({"key": self.key, "unreadable": unreadable})
        table = pyarrow.table({name: pyarrow.array(v, "string") for name, v in columns.items()})
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table.replace_schema_metadata({"vlm": record}), buffer)
        self.metadata.unlink(missing_ok=True)  # of other vectors than will now stand beside it
        write_file(self.vectors, npy_bytes(vectors))
        write_file(self.metadata, buffer.getvalue())
        return len(images), unreadable


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Return the content of an array's file: numpy's own writing hides why a disk refused it."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _embed(
    embedder: Embedder, images: Sequence[ListedImage]
) -> tuple[list[ListedImage], Float32[np.ndarray, "images dim"], dict[str, str]]:
    """Return the images that can be read, their vectors, and why the others cannot."""
    vectors = [np.zeros((0, embedder.embed_dim), np.float32)]
    kept: list[ListedImage] = []
    unreadable: dict[str, str] = {}
    for start in range(0, len(images), IMAGE_BATCH):
        pixels = []
        for image in images[start : start + IMAGE_BATCH]:
            if image.error:
                unreadable[image.address] = image.error
                continue
            try:
                pixels.append(embedder.pixels(image.source, name=image.address))
                kept.append(image)
            except DataError as error:
                unreadable[image.address] = str(error)
        if pixels:
            vectors.append(embedder.encode_pixels(torch.stack(pixels)))
    return kept, np.concatenate(vectors), unreadable


def _key(model: Sequence[Any], images: Sequence[ListedImage]) -> str:
    """Name what a part holds: whose vectors, of which images as they are now."""
    listed = [(image.uid, image.address, image.captions, _state(image.source)) for image in images]
    return hashlib.sha256(json.dumps([model, listed]).encode()).hexdigest()


def _state(source: ImageSource) -> str:
    """Return what changes when an image is replaced, without reading a file for it."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    try:
        found = os.stat(str(source))
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _is_begun(folder: Path) -> bool:
    return (folder / "img_emb").is_dir()


def _check_bound(
    out: Path, unreadable: Mapping[str, str], count: int, allowed_share: float
) -> None:
    total = count + len(unreadable)
    allowed = max(1, int(allowed_share * total)) if allowed_share else 0
    if count and len(unreadable) <= allowed:
        return
    shown = "; ".join(list(unreadable.values())[:_SHOWN])
    more = f"; and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
    raise DataError(
        f"{len(unreadable)} of {total} images cannot be read, more than allowed_share "
        f"{allowed_share:g} permits ({allowed}): {shown}{more}. What was embedded is kept in "
        f"{out}: mend or remove these, or raise --allowed_share, and run the same command again"
    )


def _parts(folder: Path, suffix: str) -> Sequence[Path]:
    return sorted(folder.glob(f"*.{suffix}"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))
