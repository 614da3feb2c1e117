"""Indexes are made once, survive being interrupted, and are never those of something else."""

import os
import shutil
import signal

import pytest

from tests.builders import (
    THINGS,
    make_samples,
    open_split,
    write_img2dataset,
    write_split,
    write_tar,
)
from tests.support.processes import PROCESSES
from vlm.data import indexing, manifest, source
from vlm.data.config import SourceConfig
from vlm.data.indexing import index_folder
from vlm.data.manifest import read_manifest
from vlm.data.source import open_source
from vlm.errors import DataError, ShardError, VlmError

EN = [en for en, _ in THINGS]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def tars(tmp_path):
    return write_img2dataset(tmp_path / "tars", EN, samples_per_shard=3)


@pytest.fixture
def scanned(monkeypatch):
    """Return the names of the tars that are looked through from now on."""
    names, scan = [], indexing.scan_tar

    def scan_and_note(path, config, **settings):
        names.append(path.name)
        return scan(path, config, **settings)

    monkeypatch.setattr(indexing, "scan_tar", scan_and_note)
    return names


def open_tars(folder, **settings):
    return open_source(SourceConfig(path=str(folder), **settings))


def captions_of(samples):
    return [sample.captions["en"][0] for sample in samples]


# In the cache folder


def test_tars_are_looked_through_once(tars, scanned):
    assert captions_of(open_tars(tars)) == captions_of(open_tars(tars)) == EN
    assert scanned == [f"{number:05d}.tar" for number in range(4)]


def test_only_a_tar_that_changed_is_looked_through_again(tars, scanned):
    open_tars(tars)
    scanned.clear()
    again = write_img2dataset(tars.parent / "again", ["another"] * 3, samples_per_shard=3)
    (again / "00000.tar").replace(tars / "00002.tar")
    assert captions_of(open_tars(tars)) == [*EN[:6], *["another"] * 3, *EN[9:]]
    assert scanned == ["00002.tar"]


def test_other_fields_have_an_index_of_their_own(tars, scanned):
    open_tars(tars)
    assert open_tars(tars, captions={"en": ("json.key",)})[0].captions == {"en": ["000000000"]}
    assert captions_of(open_tars(tars)) == EN
    assert len(scanned) == 8


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_an_index_that_is_damaged_is_made_again(tars, cache, scanned, share):
    open_tars(tars)
    for path in cache.rglob("*.arrow"):
        os.truncate(path, int(path.stat().st_size * share))
    assert captions_of(open_tars(tars)) == EN
    assert len(scanned) == 8


def test_a_folder_of_images_is_read_again_where_a_caption_changed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / f"{name}.png").write_bytes(make_samples(1)[0].image)
        (tmp_path / "f" / f"{name}.txt").write_text("a cat")
    assert captions_of(open_tars(tmp_path / "f")) == ["a cat", "a cat"]
    (tmp_path / "f/b.txt").write_text("a dog")
    assert captions_of(open_tars(tmp_path / "f")) == ["a cat", "a dog"]
    (tmp_path / "f/a.txt").unlink()
    assert len(list(open_tars(tmp_path / "f").damaged())) == 1


def test_an_index_that_vanishes_is_made_again_and_for_images_an_error(tars, cache, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/a.png").write_bytes(make_samples(1)[0].image)
    (tmp_path / "f/a.txt").write_text("a cat")
    samples, images = open_tars(tars), open_tars(tmp_path / "f")
    for path in cache.rglob("*.arrow"):
        path.unlink()
    assert captions_of(samples) == EN
    with pytest.raises(ShardError, match=f"{tmp_path}/f has changed since the source was opened"):
        images[0]


def test_a_cache_folder_that_cannot_be_written_is_named(tars, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", "/proc/nothing")
    with pytest.raises(VlmError, match="cannot write /proc/nothing/index/"):
        open_tars(tars)


def index_and_die(folder):
    """Index a folder in a process that is killed before its third tar."""
    scan, names = indexing.scan_tar, []

    def scan_or_die(path, config, **settings):
        names.append(path.name)
        if len(names) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return scan(path, config, **settings)

    indexing.scan_tar = scan_or_die
    (open_tars if "tars" in folder.name else index_folder)(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tars", "data folder"])
def test_a_killed_run_is_continued_with_what_is_missing(tars, scanned, kind):
    if kind == "data folder":
        tars = tars.rename(tars.with_name("folder"))
    process = PROCESSES.Process(
        target=_in_cache, args=(os.environ["VLM_CACHE"], index_and_die, tars)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if kind == "data folder":
        assert not (tars / "manifest.json").exists()
        index_folder(tars)
    assert captions_of(open_tars(tars)) == EN
    assert scanned == ["00002.tar", "00003.tar"]


def _in_cache(cache, function, *arguments):
    """Call a function in a child, whose environment is that of an earlier test."""
    os.environ["VLM_CACHE"] = cache
    return function(*arguments)


def index_and_note(folder):
    """Index a folder, and note in it which tars this process looked through."""
    scan = indexing.scan_tar

    def scan_and_note(path, config, **settings):
        (folder / f"{path.name} {os.getpid()}").touch()
        return scan(path, config, **settings)

    indexing.scan_tar = scan_and_note
    return captions_of(open_tars(folder))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["tars", "data folder without indexes"])
def test_two_processes_at_a_time_share_the_work_of_one(tars, kind):
    if kind != "tars":
        index_folder(tars)
        shutil.rmtree(tars / "index")
    with PROCESSES.Pool(2) as workers:
        calls = [(os.environ["VLM_CACHE"], index_and_note, tars)] * 2
        assert workers.starmap(_in_cache, calls, chunksize=1) == [EN, EN]
    assert len(list(tars.glob("*.tar *"))) == 4


@pytest.mark.distributed
def test_tars_are_looked_through_by_several_processes_where_there_is_much(tars, monkeypatch):
    monkeypatch.setattr("vlm.data.parallel.LITTLE", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    for name in ("00001.tar", "00003.tar"):
        os.truncate(tars / name, 900)
    with pytest.raises(DataError, match=r"00001\.tar cannot be read.*; .*00003\.tar cannot be"):
        open_tars(tars)
    for name in ("00001.tar", "00003.tar"):
        (tars / name).unlink()
    assert captions_of(open_tars(tars)) == [*EN[:3], *EN[6:9]]


# In a data folder


def test_a_data_folder_is_opened_by_its_indexes(tars, scanned):
    found = index_folder(tars)
    assert [entry.samples for entry in found.splits["train"]] == [3] * 4
    assert read_manifest(tars) == found
    scanned.clear()
    samples = open_split(tars)
    assert (captions_of(samples), scanned) == (EN, [])
    assert samples[3].uid == "000010000"
    (tars / "index/00001.tar.arrow").unlink()
    assert (captions_of(open_split(tars)), scanned) == (EN, ["00001.tar"])


def test_an_index_by_other_fields_is_not_used(tars):
    index_folder(tars, SourceConfig(path=str(tars), captions={"en": ("json.key",)}))
    assert captions_of(open_split(tars)) == EN
    named = open_tars(tars, captions={"en": ("json.key",)})
    assert named[0].captions == {"en": ["000000000"]}


def test_an_index_of_another_tar_is_not_used(tmp_path):
    for name, number in (("a", 3), ("b", 4)):
        folder = write_split(tmp_path / name, make_samples(number), samples_per_shard=9)
        index_folder(folder)
    index = "index/train-00000.tar.gz.arrow"
    (tmp_path / "a" / index).replace(tmp_path / "b" / index)
    assert list(open_split(tmp_path / "b")) == make_samples(4)


def test_only_a_changed_tar_of_a_data_folder_is_looked_through_again(tars, scanned):
    before = index_folder(tars)
    scanned.clear()
    assert index_folder(tars) == before
    os.utime(tars / "00001.tar", ns=(1, 1))
    assert index_folder(tars) == before
    assert scanned == ["00001.tar"]


def test_an_index_next_to_a_shard_and_one_in_the_cache_folder_hold_the_same(tmp_path, cache):
    folder = write_split(tmp_path, make_samples(12))
    cached = list(open_split(folder))
    assert len(list((cache / "index").glob("*.arrow"))) == 3
    shutil.rmtree(cache)
    index_folder(folder)
    assert len(list((folder / "index").iterdir())) == 3
    assert list(open_split(folder)) == cached == make_samples(12)
    assert not (cache / "index").exists()


def test_a_shard_of_a_data_folder_without_indexes_is_looked_through_once(tmp_path, scanned):
    folder = write_split(tmp_path, make_samples(12))
    for _ in range(2):
        assert list(open_split(folder)) == make_samples(12)
    assert scanned == [f"train-0000{number}.tar.gz" for number in range(3)]


# Verification


@pytest.fixture
def hashed(monkeypatch):
    """Return the names of the shards that are hashed from now on to be verified."""
    names, sha256_of = [], manifest.sha256_of
    monkeypatch.setattr(
        manifest, "sha256_of", lambda path: names.append(path.name) or sha256_of(path)
    )
    return names


def indexed_elsewhere(folder):
    """Index a folder as on another machine, whose cache folder this one has not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_CACHE", str(folder / "elsewhere"))
        index_folder(folder)


@pytest.mark.parametrize(("verify", "expected"), [("once", 3), ("each_open", 6), ("size", 0)])
def test_shards_are_hashed_when_they_are_first_opened_and_then_as_asked(
    tmp_path, hashed, verify, expected
):
    config = SourceConfig(path=str(write_split(tmp_path, make_samples(12))))
    indexed_elsewhere(tmp_path)
    samples = open_source(config, verify=verify)
    assert hashed == []
    list(samples)
    list(samples)
    list(open_source(config, verify=verify))
    assert len(hashed) == expected


def test_a_shard_is_hashed_again_where_it_or_its_manifest_changed(tmp_path, hashed):
    folder = write_split(tmp_path, make_samples(2))
    list(open_split(folder))
    os.utime(folder / "train-00000.tar.gz", ns=(1, 1))
    list(open_split(folder))
    assert len(hashed) == 2
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"sha256": "', '"sha256": "0'))
    with pytest.raises(ShardError, match="is damaged: sha256"):
        open_split(folder)[0]


def test_an_index_is_made_of_verified_bytes_alone_however_shards_are_verified(tmp_path, hashed):
    config = SourceConfig(path=str(write_split(tmp_path, make_samples(12))))
    path = tmp_path / "train-00000.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ShardError, match=f"{path} is damaged: sha256"):
        open_source(config, verify="size")[0]
    path.write_bytes(content)
    for _ in range(2):
        assert list(open_source(config, verify="size")) == make_samples(12)
    assert len(hashed) == 1 + 3


@pytest.mark.parametrize("indexed", [True, False])
def test_a_data_folder_needs_no_cache_folder(tmp_path, hashed, monkeypatch, indexed):
    folder = write_split(tmp_path, make_samples(2))
    if indexed:
        indexed_elsewhere(folder)
    monkeypatch.setenv("VLM_CACHE", "/proc/nothing")
    for _ in range(2):
        assert list(open_split(folder)) == make_samples(2)
    assert len(hashed) == (2 if indexed else 4)  # also before its index is made


def test_no_more_shards_are_kept_open_than_asked(tmp_path, monkeypatch):
    opened, tar_content = [], source.tar_content
    monkeypatch.setattr(
        source, "tar_content", lambda path: opened.append(path.name[10]) or tar_content(path)
    )
    config = SourceConfig(path=str(write_split(tmp_path, make_samples(12))))
    samples = open_source(config, keep_open=2)
    for index in (0, 5, 1, 6, 10, 0):
        assert samples[index] == make_samples(12)[index]
    assert opened == ["0", "1", "2", "0"]


# Keys


def test_a_key_in_two_tars_is_refused_by_both_names_in_a_data_folder_alone(tmp_path):
    for number in range(2):
        members = [("a.png", make_samples(1)[0].image), ("a.txt", b"a cat")]
        write_tar(tmp_path / f"{number}.tar", members)
    with pytest.raises(DataError, match=r"key 'a' is in .*/0\.tar and in .*/1\.tar; expected"):
        index_folder(tmp_path)
    loose = open_tars(tmp_path)
    loose.check_uids()
    assert [sample.uid for sample in loose] == ["0/a", "1/a"]
