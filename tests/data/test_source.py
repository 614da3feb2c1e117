"""A source is one sequence of samples across its shards, here and in other processes."""

import gzip
import pickle
import shutil
from dataclasses import replace

import pytest

from tests.builders import make_samples, open_split, write_split
from tests.support.processes import PROCESSES
from vlm.data.indexing import index_folder
from vlm.data.manifest import Manifest, read_manifest, write_manifest
from vlm.errors import DataError, ShardError


def uids_of(samples):
    return [sample.uid for sample in samples]


@pytest.fixture
def folder(tmp_path):
    return write_split(tmp_path, make_samples(12), samples_per_shard=5)


def test_an_index_counts_across_shards(folder):
    samples = open_split(folder)
    assert len(samples) == 12
    assert [samples[index] for index in range(12)] == make_samples(12)
    assert [samples[index].uid for index in (11, 4, 5, 0)] == [
        "sample-0011", "sample-0004", "sample-0005", "sample-0000",
    ]  # fmt: skip


def test_iteration_gives_every_sample_in_order_each_time(folder):
    samples = open_split(folder)
    assert list(samples) == list(samples) == make_samples(12)


@pytest.mark.parametrize("index", [-1, -12, 12, 13, 1000])
def test_an_index_outside_of_the_split_is_an_index_error(folder, index):
    with pytest.raises(IndexError, match=str(index)):
        open_split(folder)[index]


def test_splits_of_one_folder_are_kept_apart(folder):
    write_split(folder, make_samples(2), split="val")
    assert len(open_split(folder)) == 12
    assert len(open_split(folder, "val")) == 2


def test_shards_are_read_in_the_order_of_the_manifest(folder):
    entries = index_folder(folder).splits["train"]
    write_manifest(folder, Manifest(splits={"train": entries[::-1]}))
    uids = [sample.uid for sample in open_split(folder)]
    assert uids[:3] == ["sample-0010", "sample-0011", "sample-0005"]


def test_a_shard_that_is_missing_or_cut_is_found_before_the_first_sample(folder):
    path = folder / "train-00002.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ShardError, match=rf"shard {path} is damaged: \d+ bytes, the manifest"):
        open_split(folder)
    path.unlink()
    with pytest.raises(ShardError, match=f"shard {path} is missing"):
        open_split(folder)


def test_a_changed_shard_is_found_before_its_first_sample_and_the_others_are_read(folder):
    samples = open_split(folder)
    path = folder / "train-00002.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [samples[index] for index in range(10)] == make_samples(10)
    with pytest.raises(ShardError, match=f"shard {path} is damaged: sha256"):
        samples[10]
    assert samples.damaged() == [(2, str(error_of(samples, 11)))]


def error_of(samples, index):
    with pytest.raises(ShardError) as caught:
        samples[index]
    return caught.value


def test_an_empty_split_is_refused(tmp_path):
    write_manifest(tmp_path, Manifest(splits={"train": ()}))
    with pytest.raises(DataError, match=f"the split 'train' of {tmp_path} is empty"):
        open_split(tmp_path)


def test_shards_that_came_after_the_manifest_are_refused(folder):
    shutil.copy(folder / "train-00000.tar.gz", folder / "train-00009.tar.gz")
    (folder / ".train-00010.tar").touch()  # a copy in progress, as rsync names it
    expected = r"holds train-00009\.tar\.gz, which its manifest\.json does not list; expected `vlm"
    with pytest.raises(DataError, match=expected):
        open_split(folder)


def test_a_fingerprint_is_that_of_the_data_wherever_it_lies(folder, tmp_path):
    before = open_split(folder).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert open_split(tmp_path / "copy").fingerprint == before
    *others, last = read_manifest(folder).splits["train"]
    write_manifest(folder, Manifest(splits={"train": tuple(others), "rest": (last,)}))
    assert open_split(folder).fingerprint != before


def test_an_unknown_split_is_refused_with_those_there_are(folder):
    with pytest.raises(DataError, match="has no split 'test'; its splits are train"):
        open_split(folder, "test")


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False], ids=["tar.gz", "tar"])
def test_a_worker_process_that_is_sent_a_split_reads_all_of_it(folder, packed):
    if not packed:
        for path in list(folder.glob("*.tar.gz")):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        index_folder(folder)
    split = open_split(folder)
    with PROCESSES.Pool(1) as workers:  # not forks of this one: the split is pickled
        assert workers.apply(uids_of, (split,)) == uids_of(make_samples(12))


def test_a_sent_source_holds_no_samples(folder):
    samples = open_split(folder)
    unread = len(pickle.dumps(samples))
    list(samples)
    assert len(pickle.dumps(samples)) == unread < 2000


def test_an_address_names_the_shard_and_the_row(folder):
    samples = open_split(folder)
    assert [samples[index].address for index in (0, 4, 5, 11)] == [
        f"{folder}/train-0000{shard}.tar.gz#{row}"
        for shard, row in ((0, 0), (0, 4), (1, 0), (2, 1))
    ]


def test_shards_that_share_a_key_are_refused_when_they_are_checked(tmp_path):
    shards = [
        write_split(tmp_path / name, make_samples(2), split=name) for name in ("train", "again")
    ]
    manifest = Manifest(
        splits={
            "train": tuple(e for f in shards for s in read_manifest(f).splits.values() for e in s)
        }
    )
    for entry in manifest.splits["train"]:
        (tmp_path / entry.name).write_bytes(
            (tmp_path / entry.name.split("-")[0] / entry.name).read_bytes()
        )
    write_manifest(tmp_path, manifest)
    with pytest.raises(DataError, match=r"key 'sample-0000' is in .*train.* and in .*again"):
        open_split(tmp_path).check_uids()


def test_damaged_samples_are_all_named_with_their_addresses(tmp_path):
    samples = make_samples(6)
    cut = {number: replace(samples[number], image=samples[number].image[:60]) for number in (1, 4)}
    folder = write_split(tmp_path, [cut.get(n, sample) for n, sample in enumerate(samples)])
    found = [reason for _, reason in open_split(folder).damaged()]
    assert [sentence.split(")")[0] for sentence in found] == [
        f"sample-000{number} ({folder}/train-00000.tar.gz#{number}" for number in (1, 4)
    ]
