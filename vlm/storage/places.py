"""Where data lies: local paths, and places that fsspec reaches, whose failures may pass."""

import errno
import glob
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any, TypeVar

from braceexpand import braceexpand

from vlm.errors import DataError, PlaceError, ShardError, VlmError

PATIENCE = 300.0
"""Seconds without a byte after which a place is taken to stay away."""

_WEB = ("http", "https")
_SCHEMES = (
    "s3", "s3a", "gs", "gcs", "hf", *_WEB, "abfs", "az", "adl", "oci", "oss", "hdfs", "webhdfs",
    "sftp", "ftp",
)  # fmt: skip
_ETAGS = (
    "ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "last_modified", "mtime",
    "modified",
)  # fmt: skip
_LONGEST_WAIT = 10.0
_TRIES_IN_SILENCE = 4  # they take about a second
_BLOCK = 8 << 20
_PASSING_STATUS = (408, 425, 429)  # timeout, too early, too many requests

_T = TypeVar("_T")
logger = logging.getLogger(__name__)


class MissingFileError(ShardError):
    """The place answers, and has no such file."""


class RefusedError(PlaceError):
    """The place wants other credentials, or hides whether it has such a file."""


def is_remote(path: str) -> bool:
    """Whether a path names a file elsewhere, such as `s3://bucket/0.tar`; `file://` is local.

    Raises:
        DataError: it is a command, a chain of addresses, or its scheme is unknown.
    """
    scheme, separator, _ = path.partition("://")
    if path.startswith(("pipe:", "exec:")):
        raise DataError(f"{path}: commands are not run; expected a path or an address")
    if separator and "::" in path:
        raise DataError(f"{path}: chained addresses are not read; expected a single one")
    if not separator or scheme == "file":
        return False
    if scheme not in _SCHEMES:
        known = ", ".join(_SCHEMES)
        raise DataError(
            f"{path}: unknown scheme {scheme!r}; expected a local path or one of {known}"
        )
    return True


def expand(path: str, *, patience: float = PATIENCE) -> list[str]:
    """Return the paths that braces (`{000..299}`) and globs (`*`, `?`, `[...]`) stand for, sorted.

    A remote path without a glob is not looked for before it is fetched.

    Raises:
        DataError: nothing is there, or the place cannot list its files, as no web server can.
        PlaceError: as `read_small`.
    """
    if not is_remote(path):
        path = path.removeprefix("file://")
        if Path(path).exists():  # the characters of a pattern may be part of a name
            return [path]
    try:
        patterns = list(braceexpand(path))
    except ValueError as error:
        raise DataError(
            f"{shown(path)}: unbalanced braces; expected a range like {{000..299}}"
        ) from error
    found = set()
    for pattern in patterns:
        matches = _matches(pattern, patience)
        if not matches:
            raise DataError(f"{pattern}: nothing is there")
        found.update(matches)
    return sorted(found)


def _matches(pattern: str, patience: float) -> list[str]:
    if not is_remote(pattern):
        return [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
    if pattern.startswith(_WEB):
        if "*" in pattern or "[" in pattern:  # a question mark begins a query
            raise DataError(
                f"{shown(pattern)}: web servers list no files; expected braces like {{0..9}}"
            )
        return [pattern]
    if not glob.has_magic(pattern):
        return [pattern]

    def matches() -> list[str]:
        place, path = _place(pattern)
        place.invalidate_cache()  # it may hold a listing of long ago
        return [place.unstrip_protocol(match) for match in place.glob(path)]

    return _patiently(matches, pattern, patience)


def within(folder: str, name: str) -> str:
    """Return the address of a file in a folder; a query stays at its end."""
    path = shown(folder)
    return f"{path.rstrip('/')}/{name}{folder[len(path) :]}"


def read_small(url: str, *, patience: float = PATIENCE) -> bytes:
    """Return the bytes of a small remote file, such as a manifest.

    Raises:
        MissingFileError: it is not there.
        PlaceError: the place refuses it, or stays away for longer than `patience` seconds.
    """

    def read() -> bytes:
        place, path = _place(url)
        content: bytes = place.cat_file(path)
        return content

    return _patiently(read, url, patience)


def state_of(url: str, *, patience: float = PATIENCE) -> dict[str, Any]:
    """Return what changes when a remote file is changed: `bytes`, its size, and `etag`.

    The latter is its ETag or the like, empty where the place has nothing of the kind. Raises the
    errors of `read_small`.
    """
    info = _patiently(lambda: _info(*_place(url)), url, patience)
    if info["size"] is None:
        raise PlaceError(f"{shown(url)}: the server does not say how large it is")
    etag = next((str(info[name]) for name in _ETAGS if info.get(name)), "")
    return {"bytes": info["size"], "etag": etag}


def read_blocks(
    url: str, size: int, *, start: int = 0, patience: float = PATIENCE
) -> Iterator[tuple[int, bytes]]:
    """Give a remote file of `size` bytes from `start` on, as blocks and where each begins.

    After a failure the bytes go on where they ended; where the server allows no ranges, they begin
    again at 0.

    Raises:
        ShardError: it is not there, or has another size.
        PlaceError: the place refuses it, or no byte arrived for longer than `patience` seconds.
    """
    position = furthest = start
    waiting = _Waiting(url, patience)
    while position < size:
        try:
            stream, position = _open_at(url, position, size)
            with closing(stream):
                while position < size:
                    block = stream.read(min(_BLOCK, size - position))
                    if not block:
                        raise ConnectionError(f"it ended after {position} of {size} bytes")
                    yield position, block
                    position += len(block)
                    if position > furthest:  # repeated bytes are no progress
                        furthest = position
                        waiting.begin()
        except Exception as error:  # every library has its own errors for the same failures
            waiting.wait(error)


def shown(url: str) -> str:
    """Return an address without its query, which may hold a signature."""
    return url.partition("?")[0] if url.startswith(_WEB) else url


def _open_at(url: str, start: int, size: int) -> tuple[Any, int]:
    """Return a stream of a remote file and where it begins: at `start`, or at 0."""
    place, path = _place(url)
    found = _info(place, path)["size"]
    if found not in (None, size):
        raise ShardError(f"{shown(url)} has {found} bytes, expected {size}; it has changed")
    if not url.startswith(_WEB):
        stream = place.open(path, "rb", cache_type="none")
        stream.seek(start)
        return stream, start
    # Block size 0 gives one response for all bytes, whose status shows if the range was served.
    headers = {"Range": f"bytes={start}-"} if start else {}
    stream = place.open(path, "rb", block_size=0, size=size, headers=headers)
    return stream, start if stream.r.status == 206 else 0


def _info(place: Any, path: str) -> dict[str, Any]:
    place.invalidate_cache()  # a listing of long ago may hold another size
    info: dict[str, Any] = place.info(path)
    if info["type"] != "file":
        raise FileNotFoundError(path)
    return info


def _place(url: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it.

    It is asked for each time: fsspec keeps one a process, which a forked child must not use.
    """
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    try:
        if url.startswith(_WEB):
            from aiohttp import ClientTimeout

            options["client_kwargs"] = {
                # A slow line may need any time for the whole.
                "timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60),
                # The bytes as they are: nothing is packed on the way, no `.gz` is unpacked.
                "headers": {"Accept-Encoding": "identity"},
                "auto_decompress": False,
                "trust_env": True,  # proxies, as HTTPS_PROXY names them
            }
        place, path = url_to_fs(url, **options)
    except ImportError as error:
        raise PlaceError(
            f"{shown(url)}: {error}; pip install 'vlm[remote]' brings what reads "
            "s3://, gs:// and https://"
        ) from error
    return place, path


def _patiently(call: Callable[[], _T], url: str, patience: float) -> _T:
    """Call until it answers, as long as its failures may pass."""
    waiting = _Waiting(url, patience)
    while True:
        try:
            return call()
        except Exception as error:  # every library has its own errors for the same failures
            waiting.wait(error)


class _Waiting:
    """Waits between tries, longer each time, and ends with what was wrong."""

    def __init__(self, url: str, patience: float) -> None:
        self.url, self.patience = shown(url), patience
        self.begin()

    def begin(self) -> None:
        self.since, self.tries = monotonic(), 0

    def wait(self, error: Exception) -> None:
        if isinstance(error, VlmError):
            raise error
        # fsspec calls every failure of a web server's HEAD a missing file, and names its cause.
        cause = (isinstance(error, FileNotFoundError) and error.__cause__) or error
        status = _status_of(cause)
        reason = f"HTTP status {status}" if status else f"{type(cause).__name__} {cause}".strip()
        if status == 404 or isinstance(cause, FileNotFoundError):
            raise MissingFileError(f"{self.url} is not there") from error
        if (
            status in (401, 403)
            or isinstance(cause, PermissionError)
            or "Credentials" in type(cause).__name__
        ):
            raise RefusedError(
                f"{self.url} is refused ({reason}); expected credentials in the environment, "
                "such as AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS or HF_TOKEN"
            ) from error
        asked_wrongly = status and 400 <= status < 500 and status not in _PASSING_STATUS
        wrong = asked_wrongly or getattr(cause, "errno", None) == errno.EINVAL  # as s3fs says it
        if wrong or isinstance(cause, ValueError | TypeError | NotImplementedError):
            raise PlaceError(f"{self.url} cannot be read: {reason}") from error
        self.tries += 1
        left = self.since + self.patience - monotonic()
        if left <= 0:
            raise PlaceError(
                f"{self.url} stayed away for {self.patience:g} s, in {self.tries} tries; "
                f"the last failed with {reason}"
            ) from error
        if self.tries == _TRIES_IN_SILENCE:
            logger.warning("waiting for %s: %s", self.url, reason)
        # A generator of its own: many readers must not come at once, nor move the run's numbers.
        wait = min(0.1 * 2**self.tries, _LONGEST_WAIT) * Random().uniform(0.5, 1)
        sleep(min(wait, left))


def _status_of(error: BaseException) -> int | None:
    """Return the HTTP status in an error of botocore, aiohttp, gcsfs or huggingface_hub."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(response, "status_code", None)
    status = status or getattr(error, "code", None)
    return status if isinstance(status, int) else None
