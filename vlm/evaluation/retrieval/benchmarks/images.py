"""Images of a benchmark, read one by one: files by name, base64 lines, LMDB values, tar members.

A reader is a function of a position and holds no more than places; it can be pickled.
"""

import base64
import binascii
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Int64

from vlm.errors import DataError
from vlm.records.tars import bytes_in, tar_content

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True, eq=False)
class Images(Sequence[Path | bytes]):
    """Some of a source's images; a slice reads its images into a list."""

    read: Callable[[int], Path | bytes]
    """Gives the image at a position of the source."""
    positions: Int64[np.ndarray, " images"]

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Path | bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[Path | bytes]: ...

    def __getitem__(self, index: int | slice) -> Path | bytes | list[Path | bytes]:
        """Read one image, or those of a slice; a `DataError` if it cannot be read."""
        if isinstance(index, slice):
            return [self.read(position) for position in self.positions[index].tolist()]
        return self.read(int(self.positions[index]))

    def __iter__(self) -> Iterator[Path | bytes]:
        return map(self.read, self.positions.tolist())


@dataclass(frozen=True)
class EncodedLines:
    """Images in base64, each in its line of one file."""

    path: Path
    spans: Int64[np.ndarray, "lines 3"]
    """Where the base64 begins in the file, its length, and the number of its line."""

    def __call__(self, position: int) -> bytes:
        """Read and decode a line; both alphabets of base64 are known."""
        start, size, line = self.spans[position].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            return decode_base64(file.read(size), f"{self.path}, line {line}")


@dataclass(frozen=True)
class TarMembers:
    """Images that are members of tar files."""

    paths: Sequence[Path]
    spans: Int64[np.ndarray, "members 3"]
    """Which file, where the member begins in it unpacked, and its size."""

    def __call__(self, position: int) -> bytes:
        """Read a member."""
        path, start, size = self.spans[position].tolist()
        return bytes_in(_tar(self.paths[path]), start, size)


_tar = lru_cache(maxsize=8)(tar_content)


@dataclass(frozen=True)
class LmdbValues:
    """Images in base64, the values of an LMDB."""

    folder: Path
    keys: Sequence[str]

    def __call__(self, position: int) -> bytes:
        """Read and decode a value."""
        key = self.keys[position]
        with open_lmdb(self.folder).begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise DataError(f"{self.folder} has no image {key!r} any more")
        return decode_base64(value, f"{self.folder}, image {key!r}")


def decode_base64(text: bytes, name: str) -> bytes:
    """Return what base64 of either alphabet encodes; errors begin with `name`."""
    try:
        return base64.b64decode(text.translate(_URL_SAFE), validate=True)
    except binascii.Error as error:
        raise DataError(f"{name} is not an image in base64: {error}") from error


def open_lmdb(folder: Path) -> Any:
    """Return the environment, opened once a process to be read only."""
    return _environment(folder, os.getpid())


@lru_cache(maxsize=8)
def _environment(folder: Path, process: int) -> Any:
    del process  # an environment must not be used in a child that was forked
    try:
        import lmdb
    except ImportError as error:
        raise DataError(
            f"{folder} is an LMDB; `pip install lmdb` to read it, or keep the .tsv next to it"
        ) from error
    try:
        return lmdb.open(str(folder), readonly=True, create=False, lock=False, readahead=False)
    except lmdb.Error as error:
        raise DataError(f"{folder} cannot be read as an LMDB: {error}") from error


class ImageFolder:
    """Finds images by the names that annotation files give them.

    A name is a path below the folder, with or without its suffix. Where the user has named the
    folder, an image may also lie in any folder below it, as COCO's lie in `val2014`.

    Raises:
        DataError: what the user named is not a folder.
    """

    def __init__(self, named: Path | None, default: Path) -> None:
        if named is not None and not named.is_dir():
            raise DataError(f"{named} is not a folder; expected the one with the images")
        self.folder = named or default
        self._search = named is not None

    def find(self, name: str) -> Path | None:
        """Return the file of an image, or None if it is not there."""
        for candidate in (name, *(name + suffix for suffix in SUFFIXES)):
            path = self.folder / candidate
            if os.path.isfile(path):  # Path's own method raises where a name is too long
                return path
        return self._below.get(Path(name).name) if self._search else None

    @cached_property
    def _below(self) -> dict[str, Path | None]:
        """Files by name and by stem; None where two have the same."""
        found: dict[str, Path | None] = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    path = Path(folder, name)
                    for key in (name, stem):
                        found[key] = None if key in found else path
        return found
