"""The bytes of a source's files on this machine: those of a place come through the node cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.data.config import Verify
from vlm.data.layout import ShardFile, local_state
from vlm.errors import DataError, ShardError
from vlm.storage.cache_folder import cache_folder
from vlm.storage.node_cache import NodeCache, RemoteFile

GIB = 1 << 30


def node_cache(gib: float) -> NodeCache:
    """Return the cache of remote files that this machine's processes share, bounded in GiB."""
    return NodeCache(cache_folder() / "shards", int(gib * GIB))


@contextmanager
def local_copy(
    file: ShardFile, cache: NodeCache | None, *, sha256: str | None = None, verify: Verify = "once"
) -> Iterator[Path]:
    """Give the path of a file's bytes, which is not removed while the block runs.

    Args:
        file: A tar or a table; of images, their folder is given as it is.
        cache: Where remote ones are kept; None if there are none.
        sha256: What the bytes of a remote one were when its index was made, if that is known.
        verify: When the bytes of a local one are compared with its manifest; those of a remote one
            were when they came.

    Raises:
        ShardError: it is missing, or not what it was when it was listed.
        DataError: one of the block, with the file's own name in the place of its copy's.
        PlaceError: it cannot be fetched, or not be kept.
    """
    if not file.is_remote:
        path = Path(file.path)
        if not file.images:
            check_unchanged(file)
        if file.entry:
            file.entry.verify(path, verify)
        yield path
        return
    assert cache is not None, "only local files do without"
    with cache.copy_of(remote_file(file, sha256=sha256)) as path:
        try:
            if file.entry and verify == "each_open":
                file.entry.verify(path, verify)
            yield path
        except DataError as error:
            raise type(error)(str(error).replace(str(path), file.name)) from error


def remote_file(file: ShardFile, *, sha256: str | None = None) -> RemoteFile:
    """Return what is known of a file at a place."""
    state = file.state
    return RemoteFile(file.path, file.size, state.get("sha256", sha256), state.get("etag", ""))


def check_unchanged(file: ShardFile) -> None:
    """Refuse, by a `ShardError`, a local file that is not what it was when it was listed."""
    try:
        found = local_state(file.path)
    except OSError as error:
        lost = "is missing; the manifest lists it" if file.entry else "cannot be read"
        raise ShardError(f"shard {file.path} {lost}: {error.strerror}") from error
    if file.entry and found["bytes"] != file.size:
        raise ShardError(
            f"shard {file.path} is damaged: {found['bytes']} bytes, the manifest says {file.size}"
        )
    if not file.entry and found != file.state:
        raise ShardError(f"shard {file.path} has changed since the source was opened")
