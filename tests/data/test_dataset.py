"""A split is one sequence of samples across its shards, here and in other processes."""

import gzip
import pickle
from dataclasses import replace

import pytest

from tests.builders import make_samples, write_split
from tests.support.processes import PROCESSES
from vlm.data.dataset import ShardedSplit
from vlm.data.manifest import Manifest, read_manifest, write_manifest
from vlm.data.shards import index_folder
from vlm.errors import DataError


def uids_of(samples):
    return [sample.uid for sample in samples]


@pytest.fixture
def folder(tmp_path):
    return write_split(tmp_path, make_samples(12), samples_per_shard=5)


def test_an_index_counts_across_shards(folder):
    samples = ShardedSplit(folder, "train")
    assert len(samples) == 12
    assert [samples[index] for index in range(12)] == make_samples(12)
    assert [samples[index].uid for index in (11, 4, 5, 0)] == [
        "sample-0011", "sample-0004", "sample-0005", "sample-0000",
    ]  # fmt: skip


def test_iteration_gives_every_sample_in_order_each_time(folder):
    samples = ShardedSplit(folder, "train")
    assert list(samples) == list(samples) == make_samples(12)


@pytest.mark.parametrize("index", [-1, -12, 12, 13, 1000])
def test_an_index_outside_of_the_split_is_an_index_error(folder, index):
    with pytest.raises(IndexError, match=str(index)):
        ShardedSplit(folder, "train")[index]


def test_splits_of_one_folder_are_kept_apart(folder):
    write_split(folder, make_samples(2), split="val")
    assert len(ShardedSplit(folder, "train")) == 12
    assert len(ShardedSplit(folder, "val")) == 2


def test_shards_are_read_in_the_order_of_the_manifest(folder):
    entries = index_folder(folder).splits["train"]
    write_manifest(folder, Manifest(splits={"train": entries[::-1]}))
    uids = [sample.uid for sample in ShardedSplit(folder, "train")]
    assert uids[:3] == ["sample-0010", "sample-0011", "sample-0005"]


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damage_in_the_last_shard_is_found_before_the_first_sample(folder, damage):
    path = folder / "train-00002.tar.gz"
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=f"shard {path} is"):
        ShardedSplit(folder, "train")


def test_an_empty_split_is_refused(folder):
    write_manifest(folder, Manifest(splits={"train": ()}))
    with pytest.raises(DataError, match=f"the split 'train' of {folder} is empty"):
        ShardedSplit(folder, "train")


def test_an_unknown_split_is_refused_with_those_there_are(folder):
    with pytest.raises(DataError, match="has no split 'test'; its splits are train"):
        ShardedSplit(folder, "test")


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False], ids=["tar.gz", "tar"])
def test_a_worker_process_that_is_sent_a_split_reads_all_of_it(folder, packed):
    if not packed:
        for path in list(folder.glob("*.tar.gz")):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        index_folder(folder)
    split = ShardedSplit(folder, "train")
    with PROCESSES.Pool(1) as workers:  # not forks of this one: the split is pickled
        assert workers.apply(uids_of, (split,)) == uids_of(make_samples(12))


def test_a_sent_split_is_small(folder):
    assert len(pickle.dumps(ShardedSplit(folder, "train"))) < 1000  # a path, not the shards


def test_an_address_names_the_shard_and_the_row(folder):
    samples = ShardedSplit(folder, "train")
    assert [samples[index].address for index in (0, 4, 5, 11)] == [
        f"{folder}/train-0000{shard}.tar.gz#{row}"
        for shard, row in ((0, 0), (0, 4), (1, 0), (2, 1))
    ]


def test_a_manifest_whose_shards_share_a_key_is_refused(tmp_path):
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
        ShardedSplit(tmp_path, "train")


def test_damaged_samples_are_all_named_with_their_addresses(tmp_path):
    samples = make_samples(6)
    cut = {number: replace(samples[number], image=samples[number].image[:60]) for number in (1, 4)}
    folder = write_split(tmp_path, [cut.get(n, sample) for n, sample in enumerate(samples)])
    found = list(ShardedSplit(folder, "train").damaged())
    assert [sentence.split(")")[0] for sentence in found] == [
        f"sample-000{number} ({folder}/train-00000.tar.gz#{number}" for number in (1, 4)
    ]
