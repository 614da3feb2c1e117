"""Tars: where the members of each key lie, and their bytes."""

import gzip
import io
import mmap
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from vlm.errors import ShardError
from vlm.records.texts import BLOCK, DAMAGE, guarded

Content = bytes | mmap.mmap
"""The bytes of a tar, unpacked."""

TAR_SUFFIXES = (".tar", ".tar.gz")
# Shards of small images unpack to a few times their size, zeros to a thousand times.
_LARGEST_RATIO = 50
_LITTLE = 1 << 25  # bytes that may come of anything
_LONGEST_END = 1 << 16  # bytes: six times what tar and Python's tarfile write at the most


class Member(NamedTuple):
    """Where one file of a sample lies in a tar, unpacked."""

    start: int
    size: int


def members_by_key(path: Path) -> tuple[Content, dict[str, dict[str, Member]]]:
    """Return the bytes of a tar, and its members by key and by extension in lower case.

    A key is the name up to the first dot of its last part; members of one key need not be
    neighbours. Folders and hidden files are left out.

    Raises:
        ShardError: the tar cannot be read to its end, or a member is there twice.
    """
    content, samples = tar_content(path), dict[str, dict[str, Member]]()
    for _, (key, extension, member) in guarded(path, _members_of(content)):
        if extension in samples.setdefault(key, {}):
            raise ShardError(f"{path} cannot be read: {key}.{extension} occurs twice")
        samples[key][extension] = member
    return content, samples


def _members_of(content: Content) -> Iterator[tuple[str, tuple[str, str, Member]]]:
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in iter(archive.next, None):
            archive.members.clear()  # type: ignore[attr-defined] # grows with the tar; not in typeshed
            if member.size < 0:  # the next header would be an earlier one, for ever
                raise tarfile.ReadError(f"{member.name} has the size {member.size}")
            key, extension = base_plus_ext(member.name)
            if key is None or member.isdir():
                continue
            extension, place = extension.lower(), Member(member.offset_data, member.size)
            if not member.isfile() or member.issparse():  # its bytes are elsewhere, or scattered
                extension, place = f"{extension} (a link, device or file with holes)", Member(0, 0)
            yield f"sample {key!r}", (key, extension, place)
        _check_end(archive)


def _check_end(archive: tarfile.TarFile) -> None:
    """Read what follows the last member: the end of a tar is two blocks of zeros or more.

    tarfile by itself also takes a damaged header, or the end of the file, for the end.
    """
    assert archive.fileobj is not None, "it is open"
    zeros, damaged = 0, False
    for block in iter(partial(archive.fileobj.read, BLOCK), b""):
        zeros += len(block)
        damaged = damaged or bool(block.strip(b"\0"))
    # tarfile has read the first of the two blocks. Zeros without end were samples once: a disk that
    # loses power leaves them.
    if damaged or not tarfile.BLOCKSIZE <= zeros <= _LONGEST_END:
        raise tarfile.ReadError("it does not end as a tar file does; it is cut off or damaged")


def tar_content(path: Path) -> Content:
    """Return a tar's bytes, unpacked; those of a plain one are not read before they are asked for.

    Raises:
        ShardError: they cannot be read.
    """
    try:
        if path.name.lower().endswith(".gz"):
            return _unpacked(path)
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # Samples come in random order: by itself the system reads megabytes around each.
            content.madvise(mmap.MADV_RANDOM)
            return content
    except DAMAGE as error:
        raise ShardError(f"{path} cannot be read: {error}") from error


def bytes_in(content: Content, start: int, size: int) -> bytes:
    """Return some bytes of a tar; those of a mapped one are read at once, not page by page."""
    if isinstance(content, mmap.mmap) and size:
        page = start - start % mmap.PAGESIZE
        content.madvise(mmap.MADV_WILLNEED, page, start + size - page)
    return bytes(content[start : start + size])


def _unpacked(path: Path) -> bytes:
    blocks, size = [], 0
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as unpacked:
        for block in iter(partial(unpacked.read, BLOCK), b""):
            blocks.append(block)
            size += len(block)
            if size > _LITTLE + _LARGEST_RATIO * packed.tell():
                raise EOFError(
                    f"its first {packed.tell()} bytes unpack to more than {size}; expected a tar "
                    "of images"
                )
    return b"".join(blocks)


def is_tar(path: Path) -> bool:
    """Say whether a file begins as a tar does, packed or not."""
    try:
        return path.is_file() and tarfile.is_tarfile(path)
    except DAMAGE:
        return False
