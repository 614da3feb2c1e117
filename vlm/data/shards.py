"""WebDataset shards, written byte for byte alike."""

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import webdataset

from vlm.data.manifest import ShardEntry
from vlm.data.sample import Sample
from vlm.errors import DataError
from vlm.files import write_file

_IMAGE_SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff", "webp": b"RIFF"}


def write_shards(
    samples: Iterable[Sample], folder: Path, *, split: str, samples_per_shard: int
) -> tuple[ShardEntry, ...]:
    """Write samples as `SPLIT-00000.tar.gz`, ... and return their manifest entries.

    The bytes depend on the samples alone: members carry no time, owner or machine.

    Raises:
        DataError: a uid has a dot in its last part or occurs twice, or an image is of no known
            format.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}; expected at least 1")
    entries: list[ShardEntry] = []
    remaining = _check_uids(samples)
    while chunk := list(islice(remaining, samples_per_shard)):
        name = f"{split}-{len(entries):05d}.tar.gz"
        content = _pack(chunk)
        write_file(folder / name, content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(ShardEntry(name=name, samples=len(chunk), bytes=len(content), sha256=digest))
    return tuple(entries)


def _check_uids(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Pass samples on whose uids can be keys: WebDataset cuts a key at the first dot of a name."""
    seen = set()
    for sample in samples:
        if "." in sample.uid.rsplit("/", 1)[-1] or sample.uid in seen:
            raise DataError(f"the uid {sample.uid!r} has a dot in its name or occurs twice")
        seen.add(sample.uid)
        yield sample


def _pack(samples: Iterable[Sample]) -> bytes:
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(
        buffer, encoder=False, mtime=0, user="", group="", mode=0o644, compress=False
    )
    for sample in samples:
        record = {
            "captions": {language: list(texts) for language, texts in sample.captions.items()},
            "concept": sample.concept,
            "source": sample.source,
            "licence": sample.licence,
            "labels": dict(sample.labels),
        }
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        kinds = [kind for kind, mark in _IMAGE_SIGNATURES.items() if sample.image.startswith(mark)]
        if not kinds:
            raise DataError(f"the image of {sample.uid!r} is neither PNG, JPEG nor WebP")
        writer.write({"__key__": sample.uid, kinds[0]: sample.image, "json": text.encode()})
    writer.close()
    return gzip.compress(buffer.getvalue(), compresslevel=9, mtime=0)
