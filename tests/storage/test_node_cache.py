"""A node's processes fetch a shard once, into a bounded folder, whatever breaks meanwhile."""

import copy
import fcntl
import hashlib
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

import pytest

from tests.support.commands import ROOT
from tests.support.processes import PROCESSES, run_in_world
from tests.support.web_server import WebServer
from vlm.errors import PlaceError, ShardError
from vlm.storage.node_cache import NodeCache, RemoteFile

SIZE = 400_000
ROOMY = 100 * SIZE


def content_of(number: int) -> bytes:
    return hashlib.shake_128(str(number).encode()).digest(SIZE)


def sha256_of(number: int) -> str:
    return hashlib.sha256(content_of(number)).hexdigest()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Return a folder with eight shards."""
    folder = tmp_path_factory.mktemp("shards")
    for number in range(8):
        (folder / f"{number}.tar").write_bytes(content_of(number))
    return folder


@pytest.fixture
def web(shards, tmp_path):
    folder = tmp_path / "web"
    folder.symlink_to(shards)
    with WebServer(folder) as server:
        yield server


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline
        sleep(0.005)


def partial_size(folder: Path) -> int:
    return max((path.stat().st_size for path in folder.glob("*.partial")), default=0)


def fetched(cache: NodeCache, *file: str | int | None) -> Path:
    """Return a copy's path; others may remove it from now on."""
    with cache.copy_of(RemoteFile(*file)) as path:
        return path


def fetch(cache: NodeCache, web_url: str, number: int) -> Path:
    return fetched(cache, web_url, SIZE, sha256_of(number))


def test_a_copy_has_the_bytes_and_the_suffix_and_is_fetched_once(web, tmp_path):
    for _ in range(2):
        cache = NodeCache(tmp_path / "cache", ROOMY)
        path = fetched(cache, web.url("0.tar"))
        assert path.read_bytes() == content_of(0)
        assert path.name.endswith("-0.tar")
        assert path == fetch(cache, web.url("0.tar"), 0)
    assert web.log("GET") == ["GET 0.tar - 200"]


def test_a_shard_that_another_manifest_describes_is_fetched_anew(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", ROOMY)
    fetched(cache, web.url("0.tar"))
    with pytest.raises(ShardError, match=r"has 400000 bytes, expected 7; it has changed"):
        fetched(cache, web.url("0.tar"), 7)
    with pytest.raises(ShardError, match="is damaged"):
        fetched(cache, web.url("0.tar"), None, "0" * 64)
    assert fetched(cache, web.url("0.tar")).read_bytes() == content_of(0)


def test_damage_is_fetched_once_more_and_then_named(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", ROOMY)
    message = rf"0\.tar was fetched twice and is damaged: its SHA-256 is {sha256_of(0)}, expected 1"
    with pytest.raises(ShardError, match=message):
        fetched(cache, web.url("0.tar"), SIZE, "1" * 64)
    assert len(web.log("GET")) == 2
    assert partial_size(cache.folder) == 0


@pytest.mark.parametrize("whole", [True, False], ids=["good", "damaged"])
def test_what_a_dead_process_left_is_resumed_and_checked(web, tmp_path, whole):
    cache = NodeCache(tmp_path / "cache", ROOMY)
    name = fetch(cache, web.url("0.tar"), 0).name.split("-")[0]
    start = content_of(0)[:1000] if whole else bytes(1000)
    for known in (True, False):
        cache = NodeCache(tmp_path / f"cache {known}", ROOMY)
        cache.folder.mkdir()
        (cache.folder / f"{name}-{SIZE}.partial").write_bytes(start)
        path = fetched(cache, web.url("0.tar"), SIZE, sha256_of(0) if known else None)
        assert path.read_bytes() == content_of(0)
    ranges = [line.split()[2] for line in web.log("GET")]
    assert ranges == ["-", "bytes=1000-", *([] if whole else ["-"]), "-"]


def test_what_is_left_is_dropped_where_the_server_begins_again(web, tmp_path):
    web.restart(ranges=0)
    cache = NodeCache(tmp_path / "cache", ROOMY)
    path = fetch(cache, web.url("0.tar"), 0)
    path.unlink()
    path.with_name(f"{path.name[:16]}-{SIZE}.partial").write_bytes(content_of(0)[:1000])
    assert fetch(cache, web.url("0.tar"), 0).read_bytes() == content_of(0)
    assert [line.split()[2] for line in web.log("GET")] == ["-", "bytes=1000-"]


def test_a_copy_that_is_removed_while_it_is_locked_is_fetched_again(web, tmp_path, monkeypatch):
    first = fetch(NodeCache(tmp_path / "cache", ROOMY), web.url("0.tar"), 0)
    lock = fcntl.flock

    def remove_and_lock(descriptor: int, kind: int) -> None:
        monkeypatch.undo()
        first.unlink()
        lock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    again = fetch(NodeCache(tmp_path / "cache", ROOMY), web.url("0.tar"), 0)
    assert again.read_bytes() == content_of(0)
    assert len(web.log("GET")) == 2


def test_a_place_that_goes_and_comes_back_interrupts_and_repeats_nothing(web, tmp_path):
    web.restart(seconds=0.1)
    cache = NodeCache(tmp_path / "cache", ROOMY)
    thread = Thread(target=fetch, args=(cache, web.url("0.tar"), 0))
    thread.start()
    wait_until(lambda: partial_size(cache.folder) > 100_000)
    web.kill()
    sleep(0.3)
    web.restart()
    thread.join()
    assert fetch(cache, web.url("0.tar"), 0).read_bytes() == content_of(0)
    whole, rest = (line.split()[2] for line in web.log("GET"))
    assert whole == "-"
    assert int(rest.strip("bytes=-")) > 100_000


def test_data_of_twice_the_cache_goes_through_it(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", 4 * SIZE)
    mapped = []
    for number in [*range(8), *range(8)]:
        with fetch(cache, web.url(f"{number}.tar"), number).open("rb") as file:
            mapped.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        sizes = [path.stat().st_size for path in cache.folder.glob("*.tar")]
        assert sum(sizes) <= cache.max_bytes
        assert len(sizes) == min(len(mapped), 4)
    for number, content in enumerate(mapped):
        assert content[:] == content_of(number % 8)
        content.close()


def test_the_copy_that_was_fetched_longest_ago_makes_room(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", 3 * SIZE)
    paths = [fetch(cache, web.url(f"{number}.tar"), number) for number in (0, 1, 2, 0, 3)]
    assert [path.exists() for path in paths[:3]] == [True, False, True]


def test_a_copy_is_not_removed_before_it_is_opened(web, tmp_path):
    caches = [NodeCache(tmp_path / "cache", 2 * SIZE, patience=0.3) for _ in range(2)]
    files = [RemoteFile(web.url(f"{number}.tar"), SIZE, sha256_of(number)) for number in range(3)]
    message = r"2\.tar has 400000 bytes, for which .*cache has no room; expected a larger cache"
    with caches[0].copy_of(files[0]) as first, caches[0].copy_of(files[1]) as second:
        with pytest.raises(PlaceError, match=message):
            fetched(caches[1], *files[2])
        assert first.exists()
        assert second.exists()
    fetched(caches[1], *files[2])
    assert [first.exists(), second.exists()] == [False, True]


def test_files_of_one_address_are_told_apart_by_their_etags(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", ROOMY)
    paths = [fetched(cache, web.url("0.tar"), SIZE, None, version) for version in "abab"]
    assert paths[:2] == paths[2:]
    assert paths[0] != paths[1]
    assert len(web.log("GET")) == 2


def test_a_shard_larger_than_the_cache_is_refused_at_once(web, tmp_path):
    (web.folder / "small.tar").write_bytes(b"small")
    cache = NodeCache(tmp_path / "cache", SIZE - 1)
    small = fetched(cache, web.url("small.tar"))
    with pytest.raises(PlaceError, match="no room; expected a larger cache than 399999 bytes"):
        fetched(cache, web.url("0.tar"))
    assert not web.log("GET", "0.tar")
    assert small.exists()


def test_other_files_in_the_folder_are_left_alone(web, tmp_path):
    cache = NodeCache(tmp_path, SIZE)
    own = tmp_path / "photo.tar"
    own.write_bytes(bytes(SIZE))
    for number in range(2):
        fetch(cache, web.url(f"{number}.tar"), number)
    assert own.exists()


def fetch_all(rank: int, folder: Path, urls: list[str]) -> list[str]:
    cache = NodeCache(folder, ROOMY)
    # Both want the same shard most of the time.
    return [hashlib.sha256(fetched(cache, url).read_bytes()).hexdigest() for url in urls]


@pytest.mark.distributed
def test_two_processes_fetch_each_shard_once(web, tmp_path):
    web.restart(seconds=0.005)
    urls = [web.url(f"{number}.tar") for number in range(8)]
    found = run_in_world(fetch_all, 2, tmp_path / "cache", urls)
    assert found == [[sha256_of(number) for number in range(8)]] * 2
    assert sorted(web.log("GET")) == [f"GET {number}.tar - 200" for number in range(8)]


def test_a_copy_that_another_finished_just_now_is_not_fetched_again(web, tmp_path, monkeypatch):
    def size_while_another_fetches(url: str, *, patience: float) -> dict[str, int]:
        fetch(NodeCache(tmp_path / "cache", ROOMY), url, 0)
        return {"bytes": SIZE}

    monkeypatch.setattr("vlm.storage.node_cache.state_of", size_while_another_fetches)
    path = fetched(NodeCache(tmp_path / "cache", ROOMY), web.url("0.tar"))
    assert path.read_bytes() == content_of(0)
    assert len(web.log("GET")) == 1


@pytest.mark.distributed
def test_a_killed_process_leaves_its_bytes_and_no_lock_to_the_one_that_waits(web, tmp_path):
    web.restart(seconds=0.1)
    cache = NodeCache(tmp_path / "cache", ROOMY)
    killed = PROCESSES.Process(target=fetch, args=(cache, web.url("0.tar"), 0))
    killed.start()
    wait_until(lambda: partial_size(cache.folder) > 100_000)
    thread = Thread(target=fetch, args=(cache, web.url("0.tar"), 0))
    thread.start()
    sleep(0.1)
    assert len(web.log("GET")) == 1
    killed.kill()
    killed.join()
    thread.join()
    assert fetch(cache, web.url("0.tar"), 0).read_bytes() == content_of(0)
    whole, rest = (line.split()[2] for line in web.log("GET"))
    assert whole == "-"
    assert int(rest.strip("bytes=-")) > 100_000


# A thread of fsspec is there; later versions of Python warn of any thread at a fork.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_worker_shares_no_locks_with_its_parent(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", 2 * SIZE, patience=5)
    ready, go = os.pipe()
    with cache.copy_of(RemoteFile(web.url("0.tar"), SIZE, sha256_of(0))) as first:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os.read(ready, 1)
            fetch(cache, web.url("3.tar"), 3)
            good = fetch(cache, web.url("4.tar"), 4).read_bytes() == content_of(4)
            os._exit(0 if good else 1)
    fetch(cache, web.url("1.tar"), 1)
    with cache.copy_of(RemoteFile(web.url("2.tar"), SIZE, sha256_of(2))) as last:
        assert not first.exists()  # the child, which is there, holds it no more
        os.write(go, b"!")
        assert os.waitpid(child, 0)[1] == 0
        assert last.exists()
    os.close(ready)
    os.close(go)


def _is_open_at(descriptor, path):
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:  # the listing's own, which is closed by now
        return False


def test_a_lock_ends_with_its_holder_whoever_has_the_file_open_as_well(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", 2 * SIZE, patience=5)
    with cache.copy_of(RemoteFile(web.url("0.tar"), SIZE, sha256_of(0))) as first:
        (own,) = (fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open_at(fd, first))
        childs = os.dup(own)  # as a child has it from its fork until it closes it
    fetch(cache, web.url("1.tar"), 1)
    fetch(cache, web.url("2.tar"), 2)
    os.close(childs)
    assert not first.exists()


@contextmanager
def largest_file(size: int):
    """Let the system refuse to make files longer, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_one_sentence_and_gets_its_space_back(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", ROOMY)
    with (
        largest_file(SIZE // 2),
        pytest.raises(PlaceError, match=r"0\.tar cannot be kept in .*/cache: File too large$"),
    ):
        fetch(cache, web.url("0.tar"), 0)
    assert partial_size(cache.folder) == 0
    assert fetch(cache, web.url("0.tar"), 0).read_bytes() == content_of(0)


def test_a_folder_that_cannot_be_made_is_one_sentence(web, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        PlaceError, match=r"0\.tar cannot be kept in .*/file/cache: Not a directory$"
    ):
        fetch(NodeCache(tmp_path / "file" / "cache", ROOMY), web.url("0.tar"), 0)


def test_what_is_prefetched_is_there_when_it_is_needed(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", ROOMY, ahead=2)
    cache.prefetch(
        RemoteFile(web.url(f"{number}.tar"), SIZE, sha256_of(number)) for number in range(4)
    )
    wait_until(lambda: len(list(cache.folder.glob("*.tar"))) == 2)
    for number in range(2):
        fetch(cache, web.url(f"{number}.tar"), number)
    assert sorted(web.log("GET")) == ["GET 0.tar - 200", "GET 1.tar - 200"]


def test_a_shard_that_is_being_prefetched_is_waited_for(web, tmp_path):
    web.restart(seconds=0.02)
    cache = NodeCache(tmp_path / "cache", ROOMY)
    for _ in range(3):
        cache.prefetch([RemoteFile(web.url("0.tar"), SIZE, sha256_of(0))])
    wait_until(lambda: partial_size(cache.folder))
    assert fetch(cache, web.url("0.tar"), 0).read_bytes() == content_of(0)
    assert len(web.log("GET")) == 1


def test_errors_of_prefetching_are_raised_where_the_shard_is_needed(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", ROOMY)
    cache.prefetch([RemoteFile(web.url("9.tar"))])
    wait_until(lambda: web.log("HEAD"))
    with pytest.raises(ShardError, match=r"9\.tar is not there"):
        fetched(cache, web.url("9.tar"))


def test_a_program_ends_while_shards_are_prefetched(web, tmp_path):
    web.restart(seconds=1)
    program = (
        "import sys, time; from pathlib import Path\n"
        "from vlm.storage.node_cache import NodeCache, RemoteFile\n"
        "folder = Path(sys.argv[1])\n"
        "NodeCache(folder, 10**9).prefetch([RemoteFile(sys.argv[2])])\n"
        "while not list(folder.glob('*.partial')): time.sleep(0.01)\n"
    )
    command = [sys.executable, "-c", program, tmp_path / "cache", web.url("0.tar")]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, timeout=5, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_cache_is_sent_as_its_settings(web, tmp_path):
    cache = NodeCache(tmp_path / "cache", ROOMY, patience=7, ahead=3)
    fetch(cache, web.url("0.tar"), 0)
    sent = copy.copy(cache)  # by what a worker process is sent
    assert (sent.folder, sent.max_bytes, sent.patience, sent.ahead) == (cache.folder, ROOMY, 7, 3)
    fetch(sent, web.url("0.tar"), 0)
    assert len(web.log("GET")) == 1
