"""Patterns are expanded, remote bytes are read, and failures of a place are waited for or named."""

import gzip
import sys

import pytest

from tests.support.web_server import WebServer
from vlm.errors import DataError, PlaceError, ShardError
from vlm.storage.places import (
    MissingFileError,
    expand,
    is_remote,
    read_blocks,
    read_small,
    state_of,
    within,
)


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    with WebServer(folder) as server:
        yield server


def read(url: str, size: int, **settings: float) -> bytes:
    content = bytearray()
    for position, block in read_blocks(url, size, **settings):
        content[position:] = block
    return bytes(content)


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("/data/0.tar", False), ("0.tar", False), ("file:///data/0.tar", False), ("a:b.tar", False),
        ("s3://bucket/0.tar", True), ("gs://bucket/0.tar", True), ("http://host/0.tar", True),
        ("hf://datasets/owner/name/0.tar", True), ("https://host/0.tar?signature=a", True),
    ],
)  # fmt: skip
def test_the_scheme_decides_whether_a_path_is_remote(path, remote):
    assert is_remote(path) is remote


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:cat 0.tar", "commands are not run"),
        ("exec:cat 0.tar", "commands are not run"),
        ("simplecache::s3://bucket/0.tar", "chained"),
        ("zip://0.tar::file:///a.zip", "chained"),
        ("gopher://host/0.tar", "unknown scheme 'gopher'; expected a local path or one of s3, "),
        ("memory://0.tar", "unknown scheme"),
        ("://0.tar", "unknown scheme"),
    ],
)
def test_commands_chains_and_unknown_schemes_are_refused(path, message):
    with pytest.raises(DataError, match=message):
        is_remote(path)


def test_braces_and_globs_of_local_paths_are_expanded_and_sorted(tmp_path):
    names = ["a-0.tar", "a-1.tar", "b-0.tar", "b-10.tar", "c[1].tar", "d{0..1}.tar"]
    for name in names:
        (tmp_path / name).touch()

    def found(pattern: str) -> list[str]:
        return [path.removeprefix(f"{tmp_path}/") for path in expand(f"{tmp_path}/{pattern}")]

    assert found("{b-0,a-1}.tar") == ["a-1.tar", "b-0.tar"]
    assert found("[ab]-*.tar") == names[:4]
    assert found("{a,b,*}-0.tar") == ["a-0.tar", "b-0.tar"]
    assert found("?-??.tar") == ["b-10.tar"]
    assert found("c[1].tar") == ["c[1].tar"]
    assert found("d{0..1}.tar") == ["d{0..1}.tar"]
    assert expand(f"file://{tmp_path}/a-*.tar") == [f"{tmp_path}/a-{n}.tar" for n in (0, 1)]


@pytest.mark.parametrize("pattern", ["0.tar", "b*.tar", "{a,b}-0.tar"])
def test_a_local_pattern_for_which_nothing_is_there_is_refused(tmp_path, pattern):
    (tmp_path / "a-0.tar").touch()
    with pytest.raises(DataError, match=r"(/0|b\*|b-0)\.tar: nothing is there"):
        expand(f"{tmp_path}/{pattern}")


def test_web_addresses_have_braces_but_no_globs():
    assert expand("https://host/{08..10}.tar?k=1") == [
        f"https://host/{number}.tar?k=1" for number in ("08", "09", "10")
    ]
    with pytest.raises(DataError, match="web servers list no files; expected braces"):
        expand("https://host/*.tar")
    with pytest.raises(DataError, match="unbalanced braces"):
        expand("https://host/{0..9.tar")


def test_a_query_is_not_part_of_a_folder():
    assert within("s3://bucket/pairs/", "0.tar") == "s3://bucket/pairs/0.tar"
    assert within("https://host/pairs?k=1", "0.tar") == "https://host/pairs/0.tar?k=1"


def test_small_files_are_read_whole(web):
    (web.folder / "manifest.json").write_bytes(b"{}")
    assert read_small(web.url("manifest.json")) == b"{}"


def test_nothing_is_packed_on_the_way(web):
    (web.folder / "manifest.json").write_bytes(b"{}")
    web.restart(packs=1)
    assert read_small(web.url("manifest.json")) == b"{}"
    assert read(web.url("manifest.json"), 2) == b"{}"


def test_packed_files_are_not_unpacked_on_the_way(web):
    packed = gzip.compress(b"0123456789" * 1000)
    (web.folder / "0.tar.gz").write_bytes(packed)
    web.restart(encoding="gzip")
    assert read_small(web.url("0.tar.gz")) == packed
    assert read(web.url("0.tar.gz"), len(packed)) == packed


def test_broken_connections_go_on_where_they_ended(web):
    content = bytes(range(256)) * 4000
    (web.folder / "0.tar").write_bytes(content)
    web.restart(cut_after=300_000)
    assert read(web.url("0.tar"), len(content)) == content
    starts = [int(line.split()[2].strip("bytes=-") or 0) for line in web.log("GET")]
    assert len(starts) > 3
    assert starts == sorted(set(starts))


def test_servers_without_ranges_begin_again(web):
    content = bytes(range(256)) * 4000
    (web.folder / "0.tar").write_bytes(content)
    web.restart(ranges=0)
    assert read(web.url("0.tar"), len(content), start=1000) == content
    web.restart(ranges=0, cut_after=500_000)
    with pytest.raises(PlaceError, match=r"0\.tar stayed away for 0\.5 s, in \d+ tries; the last"):
        read(web.url("0.tar"), len(content), patience=0.5)


def test_some_answers_that_the_server_is_busy_change_nothing(web):
    names = [f"{number}.tar" for number in range(12)]
    for name in names:
        (web.folder / name).write_bytes(name.encode() * 1000)
    web.restart(fail_every=10)
    for name in names:
        assert read(web.url(name), len(name) * 1000) == name.encode() * 1000
    assert any(line.endswith("503") for line in web.log(""))


@pytest.mark.slow
def test_a_server_that_stays_busy_ends_with_what_it_said(web, caplog):
    web.restart(fail_every=1)
    with pytest.raises(PlaceError) as caught:
        state_of(f"{web.url('0.tar')}?signature=secret", patience=2)
    message = str(caught.value)
    assert message.startswith(f"{web.url('0.tar')} stayed away for 2 s, in ")
    assert message.endswith("tries; the last failed with HTTP status 503")
    assert 4 < len(web.log("HEAD")) < 10
    assert caplog.messages == [f"waiting for {web.url('0.tar')}: HTTP status 503"]


def test_a_server_that_is_not_there_is_waited_for(web):
    web.kill()
    with pytest.raises(
        PlaceError, match=r"stayed away for 0\.3 s, in \d tries; .*Connect call fail"
    ):
        read_small(web.url("0.tar"), patience=0.3)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (404, MissingFileError, "0.tar is not there"),
        (403, PlaceError, r"0.tar is refused \(HTTP status 403\); expected credentials"),
        (400, PlaceError, "0.tar cannot be read: HTTP status 400"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(web, status, kind, message):
    web.restart(fail_every=1, status=status)
    with pytest.raises(kind, match=message):
        read_small(web.url("0.tar"))
    with pytest.raises(kind, match=message):
        read(web.url("0.tar"), 5)
    assert [line.split()[0] for line in web.log("")] == ["GET", "HEAD", "GET"]


def test_a_file_of_another_size_is_refused(web):
    (web.folder / "0.tar").write_bytes(b"0123456789")
    assert state_of(web.url("0.tar"))["bytes"] == 10
    with pytest.raises(ShardError, match=r"0\.tar has 10 bytes, expected 9; it has changed"):
        read(web.url("0.tar"), 9)


def test_a_missing_library_is_named(web, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(
        PlaceError, match=r"aiohttp.*; pip install 'vlm\[remote\]' brings what reads"
    ):
        read_small(web.url("0.tar"))
