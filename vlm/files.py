"""Files and folders that are written whole or not at all."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from vlm.errors import VlmError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a file-size limit is exhausted."""

_CANNOT_WRITE = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENOENT, errno.ENAMETOOLONG,  # a folder that cannot be made, such as one in /proc
)  # fmt: skip
_HASH_BLOCK = 1 << 20


def lines_in(text: str) -> list[str]:
    """Return the lines of a text without their ends, which are line feeds alone.

    `str.splitlines` also splits at form feeds, U+2028 and more, which captions and names may hold.
    """
    lines = text.split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def read_file(path: Path, most: int) -> bytes:
    """Return the bytes of a file; an `OSError` if it is a pipe or device, or has more than `most`.

    A pipe would block its reader, and a device may have no end.
    """
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise OSError(errno.EINVAL, "it is a pipe or a device", str(path))
    if found.st_size > most:
        raise OSError(
            errno.EFBIG, f"it has {found.st_size} bytes; at most {most} are read", str(path)
        )
    return path.read_bytes()


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Raises:
        VlmError: the disk is full or the file cannot be written there.
    """
    with open_whole(path) as file:
        file.write(content)


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to, which takes its place at `path` once the block ends well.

    Raises:
        VlmError: the disk is full or the file cannot be written there.
    """
    # Of this process alone: another one may write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with clear_disk_errors(path, *_CANNOT_WRITE):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("wb")
        with clear_disk_errors(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with clear_disk_errors(path, *_CANNOT_WRITE):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill, and move it to `path` once the block ends well.

    A folder already at `path` is replaced. If the block raises, `path` is left as it was.

    Raises:
        VlmError: the disk is full, or `path` cannot be a folder.
    """
    temporary = begin_folder(path)
    try:
        with clear_disk_errors(path):
            yield temporary
        finish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_folder(path: Path) -> Path:
    """Return the name under which a folder is filled before it moves to `path`."""
    return path.with_name(f".{path.name}.partial")


def begin_folder(path: Path) -> Path:
    """Make the empty temporary folder for `path`, without what a dead process left in it.

    Raises:
        VlmError: the disk is full, or `path` cannot be a folder.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise VlmError(f"cannot write {path}: it is there and is not a folder")
    temporary = temporary_folder(path)
    with clear_disk_errors(path, *_CANNOT_WRITE):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    return temporary


def finish_folder(temporary: Path, path: Path) -> None:
    """Move a filled temporary folder to `path`, in the place of one that is there.

    All of it is on the disk before the move, and the move is when this returns.

    Raises:
        VlmError: the disk is full, or `path` cannot be replaced.
    """
    old = path.with_name(f".{path.name}.old")
    with clear_disk_errors(path, *_CANNOT_WRITE):
        flush_to_disk(*sorted(temporary.rglob("*")), temporary)
        if path.exists():  # a rename cannot replace a folder that holds files
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
        flush_to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush_to_disk(*paths: Path) -> None:
    """Wait until the disk holds the bytes of files, and the names in folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def clear_disk_errors(path: Path, *refusals: int) -> Iterator[None]:
    """Say in one sentence what the disk refused; errors of other kinds pass unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise VlmError(f"no space left to write {path}: {error.strerror}") from error
        if error.errno in refusals:
            raise VlmError(f"cannot write {path}: {error.strerror}") from error
        raise
    except SafetensorError as error:  # it carries the system's error in its text only
        if any(f"os error {number}" in str(error) for number in FULL_DISK):
            raise VlmError(f"no space left to write {path}: {error}") from error
        raise
