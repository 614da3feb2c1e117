"""Remote shards on a node's own disk: fetched once for all its processes, the oldest removed."""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from time import monotonic, sleep, time_ns
from typing import NamedTuple, Self
from weakref import WeakSet

from vlm.errors import PlaceError, ShardError, VlmError
from vlm.storage.places import PATIENCE, read_blocks, shown, state_of

_FINISHED = r"[0-9a-f]{16}-[0-9a-f]{64}-.+"
_UNFINISHED = r"[0-9a-f]{16}-(?P<bytes>\d+)\.partial"
_OURS = re.compile(f"{_FINISHED}|{_UNFINISHED}")
_POLL = 0.05


class RemoteFile(NamedTuple):
    """A file at a place, and what is known of it."""

    url: str
    size: int | None = None
    sha256: str | None = None
    etag: str = ""
    """What tells this state of it from others, where its hash is not known."""


class NodeCache:
    """Local copies of remote shards, shared by all processes of a node that name the same folder.

    A copy gets its final name once it is whole and on the disk, with the size and SHA-256 that were
    asked for. What a process was fetching when it died is resumed by the next. A cache may be used
    by several threads and sent to other processes.

    Args:
        folder: On a disk of this machine; files of others in it are left alone.
        max_bytes: Bound of the copies in the folder, where an unfinished one counts as a whole. The
            one that was asked for longest ago is removed first. A reader that has it open or mapped
            can still read it, and until it is closed it takes its space on the disk: that comes on
            top of the bound, at most what all readers keep open.
        patience: Seconds without a byte, or without room, after which fetching ends in an error.
        ahead: Shards of a process that are fetched in the background at a time.
    """

    def __init__(
        self, folder: Path, max_bytes: int, *, patience: float = PATIENCE, ahead: int = 4
    ) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.patience, self.ahead = patience, ahead
        self._threads: dict[str, Thread] = {}

    def __reduce__(self) -> tuple[object, ...]:
        settings = partial(NodeCache, patience=self.patience, ahead=self.ahead)
        return settings, (self.folder, self.max_bytes)

    @contextmanager
    def copy_of(self, file: RemoteFile) -> Iterator[Path]:
        """Give a local copy of a remote file, which is not removed while the block runs.

        What is opened or mapped in the block stays readable. Another process that fetches the same
        file is waited for.

        Raises:
            ShardError: the file is not there, of another size, or damaged twice.
            PlaceError: the place refuses it or stays away, the disk is full or cannot be written,
                or the cache has no room for it.
        """
        with self._obtain(file) as held:
            yield held.path

    def prefetch(self, files: Iterable[RemoteFile]) -> None:
        """Begin to fetch the files that are needed next, the first ones first.

        No more than `ahead` are fetched at a time: another call with the same files goes on with
        the rest. Nothing is raised here: `copy_of` tries again.
        """
        wanted = {file.url: file for file in files}
        known = {u: t for u, t in self._threads.items() if u in wanted or t.is_alive()}
        free = self.ahead - sum(thread.is_alive() for thread in known.values())
        for file in islice(
            (file for url, file in wanted.items() if url not in known), max(free, 0)
        ):
            known[file.url] = Thread(target=self._fetch_ahead, args=(file,), daemon=True)
            known[file.url].start()
        self._threads = known

    def _fetch_ahead(self, file: RemoteFile) -> None:
        with suppress(VlmError):
            self._obtain(file).close()

    def _obtain(self, file: RemoteFile) -> "_Locked":
        """Return the copy, locked against removal."""
        url, size, sha256, _ = file
        copy = _Copy(self.folder, file)
        deadline = monotonic() + self.patience
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while (held := copy.find(size, sha256)) is None:
                if size is None:
                    size = state_of(url, patience=self.patience)["bytes"]
                if unfinished := self._reserve(copy, size, sha256, deadline):
                    with unfinished:
                        self._fill(unfinished, copy, size, sha256)
                else:
                    sleep(_POLL)
        except OSError as error:
            raise PlaceError(
                f"{shown(url)} cannot be kept in {self.folder}: {error.strerror or error}"
            ) from error
        return held

    def _reserve(
        self, copy: "_Copy", size: int, sha256: str | None, deadline: float
    ) -> "_Locked | None":
        """Make room for a copy and return its unfinished file; None while that cannot be."""
        no_room = (
            f"{shown(copy.url)} has {size} bytes, for which {self.folder} has no room; expected a "
            f"larger cache than {self.max_bytes} bytes, or fewer shards in use at a time"
        )
        if size > self.max_bytes:
            raise PlaceError(no_room)
        with self._alone():
            if copy.find(size, sha256):
                return None  # another thread or process finished it just now
            held = _lock(copy.unfinished(size), fcntl.LOCK_EX, make=True)
            if held is None:
                return None  # another thread or process fetches it
            others = sorted(self._others(held.path))
            room = self.max_bytes - size - sum(bytes_ for _, bytes_, _ in others)
            for _, bytes_, path in others:
                if room >= 0:
                    break
                if unused := _lock(path, fcntl.LOCK_EX):
                    with unused:
                        path.unlink()
                    room += bytes_
            if room >= 0:
                return held
            with held:
                held.path.unlink()
        if monotonic() > deadline:
            raise PlaceError(no_room)
        return None

    def _others(self, own: Path) -> list[tuple[float, int, Path]]:
        """Return of every other copy the time of its last fetch, its final size and its path."""
        return [
            (status.st_atime, int(name["bytes"] or status.st_size), Path(entry.path))
            for entry in os.scandir(self.folder)
            if entry.name != own.name and (name := _OURS.fullmatch(entry.name))
            for status in [entry.stat()]
        ]

    def _fill(self, held: "_Locked", copy: "_Copy", size: int, sha256: str | None) -> None:
        """Fetch what is missing and give the file its final name."""
        try:
            # Without a hash, nothing would show that what was left belongs to another file.
            if sha256 is None or os.fstat(held.descriptor).st_size > size:
                os.ftruncate(held.descriptor, 0)
            for _ in range(2):  # damage on the way, or in what was resumed, may not come again
                found = self._append(held, copy.url, size)
                if sha256 in (None, found):
                    os.fsync(held.descriptor)
                    with self._alone():
                        held.path.rename(copy.finished(found))
                    return
                os.ftruncate(held.descriptor, 0)
        except OSError:
            os.ftruncate(held.descriptor, 0)  # a full disk gets its space back
            raise
        raise ShardError(
            f"{shown(copy.url)} was fetched twice and is damaged: its SHA-256 is {found}, "
            f"expected {sha256}"
        )

    def _append(self, held: "_Locked", url: str, size: int) -> str:
        """Append the bytes that are missing and return the SHA-256 of all."""
        digest = hashlib.sha256()
        start = 0
        while block := os.pread(held.descriptor, 1 << 20, start):
            digest.update(block)
            start += len(block)
        for position, block in read_blocks(url, size, start=start, patience=self.patience):
            if position == 0:  # where ranges are not served, it begins again
                os.ftruncate(held.descriptor, 0)
                digest = hashlib.sha256()
            digest.update(block)
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(held.descriptor, rest) :]
        return digest.hexdigest()

    def _alone(self) -> "_Locked":
        """Wait until no other thread or process of the node changes what the folder holds."""
        while (held := _lock(self.folder / ".lock", fcntl.LOCK_EX, make=True, wait=True)) is None:
            pass  # somebody removed it
        return held


class _Copy:
    """The names of a file's copy: finished by its SHA-256, unfinished by its size."""

    def __init__(self, folder: Path, file: RemoteFile) -> None:
        self.folder, self.url = folder, file.url
        self.key = hashlib.sha256(f"{file.etag} {file.url}".encode()).hexdigest()[:16]
        self.name = re.sub(r"[^\w.-]", "_", shown(file.url).rsplit("/", 1)[-1])[-40:]

    def finished(self, sha256: str) -> Path:
        return self.folder / f"{self.key}-{sha256}-{self.name}"

    def unfinished(self, size: int) -> Path:
        return self.folder / f"{self.key}-{size}.partial"

    def find(self, size: int | None, sha256: str | None) -> "_Locked | None":
        """Return the finished copy of this size and hash, locked against removal."""
        for path in [self.finished(sha256)] if sha256 else self.folder.glob(f"{self.key}-*-*"):
            if not (held := _lock(path, fcntl.LOCK_SH)):
                continue
            found = os.fstat(held.descriptor)
            if size in (None, found.st_size):
                # Its own date stays: what was verified of it is remembered by that.
                os.utime(held.descriptor, ns=(time_ns(), found.st_mtime_ns))
                return held
        return None


class _Locked:
    """An open file and the lock on it, which the kernel drops with the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        _locked.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.descriptor >= 0:
            # Closing alone would leave the lock to a child that was forked just now.
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            self.close()

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    __del__ = __exit__


_locked: WeakSet[_Locked] = WeakSet()


def _leave_locks_to_parent() -> None:
    for held in list(_locked):  # a child that kept the files open would keep them locked
        held.close()


os.register_at_fork(after_in_child=_leave_locks_to_parent)


def _lock(path: Path, kind: int, *, make: bool = False, wait: bool = False) -> _Locked | None:
    """Open and lock a file; None if it is not there, or locked by another thread or process."""
    flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if make else 0)
    try:
        held = _Locked(path, os.open(path, flags, 0o666))
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held.descriptor, kind if wait else kind | fcntl.LOCK_NB)
        # It may have been renamed or removed before it was locked.
        if os.path.samestat(os.fstat(held.descriptor), path.stat()):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    held.close()
    return None
