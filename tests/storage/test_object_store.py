"""Shards in an object store that speaks S3's protocol: moto's server, in a process of its own."""

import pytest
import s3fs

from tests.support.object_store import ObjectStore
from vlm.errors import DataError, PlaceError, ShardError
from vlm.storage.node_cache import NodeCache, RemoteFile
from vlm.storage.places import MissingFileError, expand, read_small, state_of

pytestmark = pytest.mark.slow  # the server takes seconds to start
SIZE = 10_000_000  # more than one block
CONTENT = bytes(range(250)) * (SIZE // 250)


def fetch(folder, url: str, size: int | None = None) -> None:
    with NodeCache(folder, SIZE).copy_of(RemoteFile(url, size)):
        pass


@pytest.fixture(scope="module")
def store():
    """Return a store, in which a bucket has two shards and a manifest."""
    with ObjectStore() as store:
        for name in ("train-00000.tar", "train-00001.tar"):
            store.put(f"zh/{name}", CONTENT)
        store.put("zh/manifest.json", b"{}")
        yield store


@pytest.mark.usefixtures("store")
def test_braces_and_globs_name_the_shards_of_a_bucket():
    shards = [f"s3://pairs/zh/train-0000{number}.tar" for number in (0, 1)]
    assert expand("s3://pairs/zh/*.tar") == shards
    assert expand("s3://pairs/{en,zh}/train-{00000..00001}.tar")[2:] == shards
    with pytest.raises(DataError, match=r"s3://pairs/en/\*\.tar: nothing is there"):
        expand("s3://pairs/en/*.tar")


@pytest.mark.usefixtures("store")
def test_shards_of_a_bucket_come_through_the_cache_and_are_resumed(tmp_path):
    cache = NodeCache(tmp_path, SIZE)
    for name in ("0", "1", "0"):
        with cache.copy_of(RemoteFile(f"s3://pairs/zh/train-0000{name}.tar")) as path:
            assert path.read_bytes() == CONTENT
    sha256, unfinished = path.name[17:81], tmp_path / f"{path.name[:16]}-{SIZE}.partial"
    path.unlink()
    unfinished.write_bytes(CONTENT[: SIZE // 2])
    with cache.copy_of(RemoteFile("s3://pairs/zh/train-00000.tar", SIZE, sha256)) as path:
        assert path.read_bytes() == CONTENT
    assert read_small("s3://pairs/zh/manifest.json") == b"{}"


def test_what_a_bucket_lacks_or_what_has_changed_in_it_is_named(store, tmp_path):
    with pytest.raises(MissingFileError, match=r"s3://pairs/zh/9\.tar is not there"):
        state_of("s3://pairs/zh/9.tar")
    with pytest.raises(MissingFileError, match=r"s3://pairs/zh is not there"):
        fetch(tmp_path, "s3://pairs/zh")
    with pytest.raises(MissingFileError, match=r"s3://nothing/9\.tar is not there"):
        read_small("s3://nothing/9.tar")
    expand("s3://pairs/zh/*.tar")  # what was listed must not be taken for what is there
    store.put("zh/train-00001.tar", b"other")
    with pytest.raises(ShardError, match="has 5 bytes, expected 10000000; it has changed"):
        fetch(tmp_path, "s3://pairs/zh/train-00001.tar", SIZE)


@pytest.mark.usefixtures("store")
def test_missing_credentials_are_named_at_once(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PlaceError, match=r"is refused \(.*expected credentials in the environment"):
        read_small("s3://pairs/zh/manifest.json")
    s3fs.S3FileSystem.clear_instance_cache()
