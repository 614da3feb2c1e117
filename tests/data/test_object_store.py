"""Shards in an object store that speaks S3's protocol: moto's server, in a process of its own."""

import socket
import subprocess
import sys
from time import sleep

import boto3
import pytest
import s3fs

from vlm.data.node_cache import NodeCache
from vlm.data.places import MissingFileError, expand, read_small, size_of
from vlm.errors import DataError

pytestmark = pytest.mark.slow  # the server takes seconds to start
SIZE = 10_000_000  # more than one block
CONTENT = bytes(range(250)) * (SIZE // 250)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def client():
    """Return a client of the store, in which a bucket has two shards and a manifest."""
    port = free_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            client = boto3.client("s3")
            for _ in range(300):
                with socket.socket() as connection:
                    if connection.connect_ex(("127.0.0.1", port)) == 0:
                        break
                sleep(0.1)
            client.create_bucket(Bucket="pairs")
            for name in ("train-00000.tar", "train-00001.tar"):
                client.put_object(Bucket="pairs", Key=f"zh/{name}", Body=CONTENT)
            client.put_object(Bucket="pairs", Key="zh/manifest.json", Body=b"{}")
            yield client
        finally:
            client.close()
            s3fs.S3FileSystem.clear_instance_cache()
            server.kill()
            server.wait()


@pytest.mark.usefixtures("client")
def test_braces_and_globs_name_the_shards_of_a_bucket():
    shards = [f"s3://pairs/zh/train-0000{number}.tar" for number in (0, 1)]
    assert expand("s3://pairs/zh/*.tar") == shards
    assert expand("s3://pairs/{en,zh}/train-{00000..00001}.tar")[2:] == shards
    with pytest.raises(DataError, match=r"s3://pairs/en/\*\.tar: nothing is there"):
        expand("s3://pairs/en/*.tar")


@pytest.mark.usefixtures("client")
def test_shards_of_a_bucket_come_through_the_cache_and_are_resumed(tmp_path):
    cache = NodeCache(tmp_path, SIZE)
    for name in ("0", "1", "0"):
        path = cache.fetch(f"s3://pairs/zh/train-0000{name}.tar")
        assert path.read_bytes() == CONTENT
    sha256, unfinished = path.name[17:81], tmp_path / f"{path.name[:16]}-{SIZE}.partial"
    path.unlink()
    unfinished.write_bytes(CONTENT[: SIZE // 2])
    path = cache.fetch("s3://pairs/zh/train-00000.tar", size=SIZE, sha256=sha256)
    assert path.read_bytes() == CONTENT
    assert read_small("s3://pairs/zh/manifest.json") == b"{}"


def test_what_a_bucket_lacks_or_what_has_changed_in_it_is_named(client, tmp_path):
    with pytest.raises(MissingFileError, match=r"s3://pairs/zh/9\.tar is not there"):
        size_of("s3://pairs/zh/9.tar")
    with pytest.raises(MissingFileError, match=r"s3://pairs/zh is not there"):
        NodeCache(tmp_path, SIZE).fetch("s3://pairs/zh")
    with pytest.raises(MissingFileError, match=r"s3://nothing/9\.tar is not there"):
        read_small("s3://nothing/9.tar")
    expand("s3://pairs/zh/*.tar")  # what was listed must not be taken for what is there
    client.put_object(Bucket="pairs", Key="zh/train-00001.tar", Body=b"other")
    with pytest.raises(DataError, match="has 5 bytes, expected 10000000; it has changed"):
        NodeCache(tmp_path, SIZE).fetch("s3://pairs/zh/train-00001.tar", size=SIZE)


@pytest.mark.usefixtures("client")
def test_missing_credentials_are_named_at_once(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"is refused \(.*expected credentials in the environment"):
        read_small("s3://pairs/zh/manifest.json")
    s3fs.S3FileSystem.clear_instance_cache()
