"""The index of a shard: an Arrow table of its samples, with everything but the pixels.

A file of it is mapped into memory, so that the workers of a machine share it.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow

from vlm.data.scanning import Row
from vlm.errors import VlmError
from vlm.files import open_whole, sha256_of
from vlm.records.texts import as_text
from vlm.storage.cache_folder import once

VERSION = 2
ROWS = 10_000
"""Rows in one batch of an index file, at most; also those of one shard of a table."""

_DIGEST = 64  # characters of the SHA-256 of all before it, at the end of an index file
_BATCH_BYTES = 1 << 26  # of images, which a table may hold
_TEXTS = pyarrow.map_(pyarrow.string(), pyarrow.string())
SCHEMA = pyarrow.schema({
    "uid": pyarrow.string(),
    "captions": pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.string())),
    "languages": pyarrow.string(),  # of the captions, sorted and joined: en+zh
    "concept": pyarrow.string(),
    "source": pyarrow.string(),
    "licence": pyarrow.string(),
    "labels": _TEXTS,
    "split": pyarrow.string(),  # of a table that has such a column
    "start": pyarrow.int64(),  # where the image begins in the unpacked tar
    "size": pyarrow.int64(),
    "path": pyarrow.binary(),  # of an image file, whose name may be no UTF-8
    "image": pyarrow.large_binary(),  # of a table that holds its images
    "error": pyarrow.string(),  # null, or why the sample cannot be used
})  # fmt: skip


def table_of(rows: Iterable[Row]) -> pyarrow.Table:
    """Return rows as a table."""
    return pyarrow.Table.from_batches([_batch(list(rows))])


def write_index(path: Path, rows: Iterable[Row], about: Mapping[str, Any]) -> pyarrow.Table:
    """Write an index file, whole or not at all, and map it into memory.

    Args:
        path: The file.
        rows: The samples, in the order of their shard; only a batch of them is in memory.
        about: What it is the index of, as JSON has it.

    Raises:
        VlmError: it cannot be written.
    """
    schema = SCHEMA.with_metadata({"vlm": json.dumps({"version": VERSION, **about})})
    with open_whole(path) as file:
        with pyarrow.ipc.new_file(file, schema) as writer:
            for batch in _batches(rows):
                writer.write_batch(batch)
        file.flush()
        file.write(sha256_of(Path(file.name)).encode())
    if (table := read_index(path, about)) is None:
        raise VlmError(f"{path} is gone or changed right after it was written")
    return table


def read_index(path: Path, about: Mapping[str, Any]) -> pyarrow.Table | None:
    """Map an index file into memory; None unless it is there, whole, and the index of that."""
    try:
        file = pyarrow.memory_map(str(path))
        content = file.read_buffer(file.size() - _DIGEST)
        digest = file.read(_DIGEST).decode()
        once(path, digest, partial(_compare, content, digest))
        table = pyarrow.ipc.open_file(content).read_all()
        found = about_index(table)
    except (OSError, pyarrow.ArrowException, LookupError, TypeError, ValueError):
        return None
    expected = {"version": VERSION, **about}
    return table if all(found.get(key) == value for key, value in expected.items()) else None


def about_index(table: pyarrow.Table) -> dict[str, Any]:
    """Return what an index says that it is the index of."""
    found: dict[str, Any] = json.loads(table.schema.metadata[b"vlm"])
    return found


def _compare(content: pyarrow.Buffer, digest: str) -> None:
    """Refuse changed bytes: Arrow checks none, and would read foreign memory by some."""
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("its bytes are not those that were written")


def _batches(rows: Iterable[Row]) -> Iterator[pyarrow.RecordBatch]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.get("image", b""))
        if len(batch) == ROWS or size > _BATCH_BYTES:
            yield _batch(batch)
            batch, size = [], 0
    yield _batch(batch)


def _batch(rows: list[Row]) -> pyarrow.RecordBatch:
    """Return rows in Arrow's form: mappings are pairs there, and messages UTF-8."""
    changed = []
    for row in rows:
        pairs = {name: list(row[name].items()) for name in ("captions", "labels") if name in row}
        error = as_text(row["error"]) if "error" in row else None
        languages = "+".join(sorted(row.get("captions", ())))
        changed.append(row | pairs | {"languages": languages, "error": error})
    return pyarrow.RecordBatch.from_pylist(changed, SCHEMA)
