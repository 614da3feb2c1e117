"""The folder with what can be made again: indexes of sources, and which shards were verified."""

import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Return the folder of the environment's `VLM_CACHE`, else `~/.cache/vlm`."""
    named = os.environ.get("VLM_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "vlm"


def once(path: Path, sha256: str, check: Callable[[], None]) -> None:
    """Call what raises unless a file has a hash, once on a machine for a file as it is now.

    That it has the hash is remembered in the cache folder.
    """
    found = path.stat()
    state = f"{path.absolute()}\0{found.st_size}\0{found.st_mtime_ns}\0{sha256}"
    name = hashlib.sha256(os.fsencode(state)).hexdigest()
    with locked(f"verified/{name}") as file:
        if not file.read():
            check()
            file.write(b"verified")


@contextmanager
def locked(name: str) -> Iterator[BinaryIO]:
    """Give a file of the cache folder that one process of this machine at a time can hold.

    Where the folder cannot be written to, or has no locks, several do the same work at a time.
    """
    path = cache_folder() / name
    file: BinaryIO
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError:
        file = io.BytesIO()
    with file:
        with suppress(OSError):  # what is in memory has no descriptor
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file
