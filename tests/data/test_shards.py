"""Shards are WebDataset's, come back sample by sample, and no damage passes unnoticed."""

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from tests.builders import encoded, make_image, make_sample, make_samples, open_split
from vlm.data.config import SourceConfig
from vlm.data.indexing import index_folder
from vlm.data.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from vlm.data.scanning import scan_tar
from vlm.data.shards import write_shards
from vlm.errors import DataError, ShardError

PNG = encoded(make_image(0))
RECORD = {"captions": {"en": ["a cat", "one cat"], "zh": ["猫"]}}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar with Python's own writer, as a user might."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_record(path: Path, record: object) -> Path:
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return write_tar(path, [("a.png", PNG), ("a.json", text)])


def entry_of(path: Path) -> ShardEntry:
    """Describe a shard as a manifest does, by what can be known without its index."""
    content = path.read_bytes()
    return ShardEntry(
        name=path.name,
        samples=len(scan_tar(path, SourceConfig(path=str(path)))),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def open_shards(folder: Path, *entries: ShardEntry):
    write_manifest(folder, Manifest(splits={"train": entries}))
    return open_split(folder)


def open_as_it_is(path: Path):
    return open_shards(path.parent, entry_of(path))


def read_all(folder: Path, entries: tuple[ShardEntry, ...]):
    return list(open_shards(folder, *entries))


@pytest.fixture(params=["train-00000.tar.gz", "train-00000.tar"], ids=["tar.gz", "tar"])
def shard(request, tmp_path):
    """Return a shard of three samples and its entry, packed and plain."""
    write_shards(make_samples(3), tmp_path, split="train", samples_per_shard=3)
    path = tmp_path / request.param
    if path.suffix == ".tar":
        packed = tmp_path / "train-00000.tar.gz"
        path.write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    return path, entry_of(path)


def test_samples_come_back_as_they_were_written(tmp_path):
    samples = make_samples(7)
    entries = write_shards(iter(samples), tmp_path, split="train", samples_per_shard=3)
    assert [(entry.name, entry.samples) for entry in entries] == [
        ("train-00000.tar.gz", 3), ("train-00001.tar.gz", 3), ("train-00002.tar.gz", 1),
    ]  # fmt: skip
    assert read_all(tmp_path, entries) == samples


def test_entries_describe_the_files(tmp_path):
    for entry in write_shards(make_samples(4), tmp_path, split="val", samples_per_shard=3):
        content = (tmp_path / entry.name).read_bytes()
        assert entry.bytes == len(content)
        assert entry.sha256 == hashlib.sha256(content).hexdigest()
        assert entry_of(tmp_path / entry.name) == entry


def test_a_shard_of_exactly_full_size_is_followed_by_none(tmp_path):
    assert len(write_shards(make_samples(6), tmp_path, split="val", samples_per_shard=3)) == 2


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards(make_samples(5), tmp_path / name, split="train", samples_per_shard=5)
    first, second = ((tmp_path / name / "train-00000.tar.gz").read_bytes() for name in ("a", "b"))
    assert first == second
    assert first[4:8] == b"\0\0\0\0"  # gzip's own time stamp


def test_members_carry_no_time_owner_or_machine(tmp_path):
    write_shards(make_samples(2), tmp_path, split="train", samples_per_shard=2)
    with tarfile.open(tmp_path / "train-00000.tar.gz") as archive:
        found = {(m.mtime, m.uname, m.gname, m.uid, m.gid, m.mode) for m in archive}
    assert len(found) == 1
    mtime, user, group, _, _, mode = found.pop()
    assert (mtime, user, group, mode) == (0, "", "", 0o644)


@pytest.mark.parametrize(
    ("file_format", "extension"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")]
)
def test_webdataset_itself_reads_the_shards(tmp_path, file_format, extension):
    samples = [make_sample(n, image=encoded(make_image(n), file_format)) for n in range(3)]
    write_shards(samples, tmp_path, split="train", samples_per_shard=3)
    with (tmp_path / "train-00000.tar.gz").open("rb") as stream:
        files = tar_file_expander([{"url": "train-00000.tar.gz", "stream": stream}])
        found = list(group_by_keys(files))
    assert [sample["__key__"] for sample in found] == [sample.uid for sample in samples]
    assert [sample[extension] for sample in found] == [sample.image for sample in samples]
    records = [json.loads(sample["json"]) for sample in found]
    assert [record["captions"] for record in records] == [sample.captions for sample in samples]


def test_the_command_tar_lists_a_shard(tmp_path):
    tar = shutil.which("tar")
    assert tar, "these tests need the command tar"
    write_shards(make_samples(2), tmp_path, split="train", samples_per_shard=2)
    path = tmp_path / "train-00000.tar.gz"
    listed = subprocess.run([tar, "-tzf", path], capture_output=True, text=True, check=True).stdout
    assert sorted(listed.split()) == [
        "sample-0000.json", "sample-0000.png", "sample-0001.json", "sample-0001.png",
    ]  # fmt: skip


def test_an_image_of_another_format_is_not_written(tmp_path):
    sample = make_sample(0, image=encoded(make_image(0), "GIF"))
    with pytest.raises(DataError, match="the image of 'sample-0000' is neither PNG, JPEG nor"):
        write_shards([sample], tmp_path, split="train", samples_per_shard=1)
    assert list(tmp_path.iterdir()) == []


def test_plain_and_packed_shards_hold_the_same_samples(shard):
    path, entry = shard
    assert read_all(path.parent, (entry,)) == make_samples(3)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999])
def test_a_truncated_shard_is_refused_by_its_name(shard, share):
    path, entry = shard
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ShardError, match=rf"{path} is damaged: \d+ bytes, the manifest says"):
        open_shards(path.parent, entry)


def test_one_byte_too_many_is_refused(shard):
    path, entry = shard
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ShardError, match=f"{path} is damaged"):
        open_shards(path.parent, entry)


def test_one_changed_bit_anywhere_is_refused_by_the_shards_name(shard):
    path, entry = shard
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 60)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(ShardError, match=f"{path} is damaged: sha256 [0-9a-f]{{12}}"):
            open_shards(path.parent, entry)[0]


def test_a_missing_shard_is_named(shard):
    path, entry = shard
    path.unlink()
    with pytest.raises(DataError, match=f"shard {path} is missing; the manifest lists it"):
        open_shards(path.parent, entry)


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_samples_is_refused_with_both(shard, count):
    path, entry = shard
    with pytest.raises(DataError, match=f"{path} holds 3 samples, the manifest says {count}"):
        open_shards(path.parent, replace(entry, samples=count))[0]


@pytest.mark.parametrize("name", ["train-0.tar", "train-0.tar.gz"])
@pytest.mark.parametrize("extension", ["png", "PNG", "jpg", "jpeg", "webp"])
def test_images_may_have_any_known_extension(tmp_path, name, extension):
    record = json.dumps(RECORD).encode()
    path = write_tar(tmp_path / name, [(f"a.{extension}", PNG), ("a.json", record)])
    sample = open_as_it_is(path)[0]
    assert sample.image == PNG
    assert sample.captions == RECORD["captions"]


def test_what_a_record_leaves_out_is_filled_in(tmp_path):
    sample = open_as_it_is(write_record(tmp_path / "train-0.tar", RECORD))[0]
    assert (sample.uid, sample.concept) == ("a", "a")
    assert (sample.source, sample.licence, sample.labels) == ("", "", {})


@pytest.mark.parametrize(("concept", "expected"), [(0, "0"), ("0", "0"), (None, "a"), ("", "a")])
def test_the_concept_may_be_any_number_and_is_the_key_only_where_missing(
    tmp_path, concept, expected
):
    path = write_record(tmp_path / "t-0.tar", {"captions": {"en": ["x"]}, "concept": concept})
    assert open_as_it_is(path)[0].concept == expected


@pytest.mark.parametrize(
    "record",
    [b'{"captions": {"en": ["cat \\ud83d"]}}', b'{"captions": {"en": "x"}, "concept": "\\udc00"}'],
    ids=["caption", "concept"],
)
def test_half_of_a_character_is_refused_by_shard_and_sample(tmp_path, record):
    path = write_record(tmp_path / "t-0.tar", record)
    with pytest.raises(DataError, match=rf"{path}, sample 'a': .* is half a character"):
        open_as_it_is(path)[0]


def test_a_key_in_two_shards_of_a_split_is_refused_and_in_two_splits_is_not(tmp_path):
    for name in ("train-00000.tar", "train-00001.tar", "val-00000.tar"):
        write_record(tmp_path / name, {"captions": {"en": [name]}})
    with pytest.raises(DataError, match=r"key 'a' is in .*train-00000\.tar and in .*00001"):
        index_folder(tmp_path)
    (tmp_path / "train-00001.tar").unlink()
    assert sorted(index_folder(tmp_path).splits) == ["train", "val"]


def test_languages_with_a_region_are_read_as_the_language(tmp_path):
    captions = {"zh-CN": ["猫"], "zh-TW": "貓", "en-US": "a cat"}
    (sample,) = open_as_it_is(write_record(tmp_path / "t-0.tar", {"captions": captions}))
    assert sample.captions == {"zh": ["猫", "貓"], "en": ["a cat"]}
    captions = {"zh": ["猫"], "zh-Hant": ["貓"]}
    (tmp_path / "other").mkdir()
    (sample,) = open_as_it_is(write_record(tmp_path / "other/t-1.tar", {"captions": captions}))
    assert sample.captions == captions


def test_shards_of_another_project_without_captions_are_not_indexed(tmp_path):
    write_record(tmp_path / "train-00000.tar", {"name": "a cat", "url": "x"})
    found = r"no sample of .*00.tar can be used: .*found no caption in 'name', 'url'"
    with pytest.raises(DataError, match=found):
        index_folder(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_captions_may_be_one_string(tmp_path):
    record = {"captions": {"en": "a cat", "zh": ["猫"]}}
    sample = open_as_it_is(write_record(tmp_path / "train-0.tar", record))[0]
    assert sample.captions == {"en": ["a cat"], "zh": ["猫"]}


@pytest.mark.parametrize("nothing", [[], "", None], ids=["an empty list", "an empty text", "null"])
def test_a_language_without_captions_is_left_out(tmp_path, nothing):
    record = {"captions": {"en": ["a cat"], "zh": nothing}}
    sample = open_as_it_is(write_record(tmp_path / "train-0.tar", record))[0]
    assert sample.captions == {"en": ["a cat"]}


def test_members_of_no_sample_do_no_harm(tmp_path):
    record = json.dumps(RECORD).encode()
    members = [("README", b"text"), ("a.png", PNG), ("a.cls", b"7"), ("a.json", record)]
    shard = open_as_it_is(write_tar(tmp_path / "train-0.tar", members))
    assert len(shard) == 1
    assert shard[0].image == PNG


def test_samples_in_sub_folders_keep_their_path_as_name(tmp_path):
    record = json.dumps(RECORD).encode()
    members = [("x/a.png", PNG), ("x/a.json", record), ("y/a.png", PNG), ("y/a.json", record)]
    shard = open_as_it_is(write_tar(tmp_path / "train-0.tar", members))
    assert [shard[position].uid for position in range(len(shard))] == ["x/a", "y/a"]


@pytest.mark.parametrize(
    "record",
    [
        b"", b"{", b"\xff", [], "text", 3, None, {}, {"captions": {}}, {"captions": []},
        {"captions": {"en": []}}, {"captions": None}, RECORD | {"labels": ["x"]},
    ],
    ids=[
        "empty", "cut off", "not UTF-8", "a list", "a string", "a number", "null",
        "no captions", "empty captions", "captions in a list", "a language without captions",
        "captions are null", "labels in a list",
    ],
)  # fmt: skip
def test_a_record_that_is_not_ours_is_refused_by_shard_and_sample(tmp_path, record):
    path = write_record(tmp_path / "train-0.tar", record)
    with pytest.raises(DataError, match=f"{path}, sample 'a'") as caught:
        open_as_it_is(path)[0]
    assert not isinstance(caught.value, ShardError)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("a.png", PNG)], "'a' needs one image and a .json or .txt, has png"),
        ([("a.json", b"{}")], "'a' needs one image and a .json or .txt, has json"),
        ([("a.txt", b"x")], "'a' needs one image and a .json or .txt, has txt"),
        ([("a.png", PNG), ("a.jpg", PNG), ("a.json", b"{}")], "has jpg, json, png"),
        ([("a.png", PNG), ("a.json", b"{}"), ("a.png", PNG)], "a.png occurs twice"),
        ([("a.png", PNG), ("a.json", b"{}"), ("a.JSON", b"{}")], "a.json occurs twice"),
    ],
    ids=[
        "no record", "no image", "neither", "two images", "an image twice", "a record twice",
    ],
)  # fmt: skip
def test_a_shard_whose_members_make_no_samples_is_refused(tmp_path, members, said):
    path = write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(DataError, match=rf"{path}.*{said}"):
        index_folder(tmp_path)


@pytest.mark.parametrize("name", ["train-0.tar", "train-0.tar.gz"])
@pytest.mark.parametrize(
    "content", [b"", b"a text, no tar", b"\xff" * 2000], ids=["empty", "text", "noise"]
)
def test_a_file_that_is_no_tar_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{tmp_path / name} cannot be read"):
        index_folder(tmp_path)


def test_indexing_refuses_a_packed_shard_cut_anywhere(tmp_path):
    write_shards(make_samples(3), tmp_path, split="train", samples_per_shard=3)
    path = tmp_path / "train-00000.tar.gz"
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=f"{path} cannot be read"):
            index_folder(tmp_path)


def test_indexing_groups_shards_by_the_name_before_the_last_dash(tmp_path):
    for split, count in (("train", 5), ("test-style", 2)):
        write_shards(make_samples(count), tmp_path, split=split, samples_per_shard=2)
    write_record(tmp_path / "val-7.tar", RECORD)
    (tmp_path / "notes.txt").write_text("not a shard")
    manifest = index_folder(tmp_path)
    found = {
        split: [(entry.name, entry.samples) for entry in entries]
        for split, entries in manifest.splits.items()
    }
    assert found == {
        "train": [
            ("train-00000.tar.gz", 2), ("train-00001.tar.gz", 2), ("train-00002.tar.gz", 1),
        ],
        "test-style": [("test-style-00000.tar.gz", 2)],
        "val": [("val-7.tar", 1)],
    }  # fmt: skip
    assert read_manifest(tmp_path) == manifest
    assert list(open_split(tmp_path)) == make_samples(5)


def test_indexing_a_second_time_notices_what_changed(tmp_path):
    write_record(tmp_path / "val-0.tar", RECORD)
    before = index_folder(tmp_path)
    write_record(tmp_path / "val-0.tar", RECORD | {"concept": "cat"})
    after = index_folder(tmp_path)
    assert before.splits["val"][0].sha256 != after.splits["val"][0].sha256
    assert read_all(tmp_path, after.splits["val"])[0].concept == "cat"


@pytest.mark.parametrize(
    ("name", "said"),
    [(None, "holds no shard; expected files like train-00000.tar"), ("train.tar", "no split")],
    ids=["no shard", "a name without a dash"],
)
def test_a_folder_that_cannot_be_indexed_says_why(tmp_path, name, said):
    if name:
        write_record(tmp_path / name, RECORD)
    with pytest.raises(DataError, match=f"{tmp_path}.* {said}"):
        index_folder(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_indexing_a_missing_folder_names_it(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/gone is not a folder"):
        index_folder(tmp_path / "gone")


def plain_shard(folder, count=5):
    """Write one plain tar and return its path and bytes."""
    write_shards(make_samples(count), folder, split="train", samples_per_shard=count)
    packed = folder / "train-00000.tar.gz"
    content = gzip.decompress(packed.read_bytes())
    packed.unlink()
    return folder / "train-00000.tar", content


def test_indexing_refuses_a_plain_tar_cut_at_any_block(tmp_path):
    path, content = plain_shard(tmp_path)
    end = len(content.rstrip(b"\0"))
    for length in [*range(512, end, 512), *range(700, end, 1024)]:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="train-00000"):
            index_folder(tmp_path)


def test_indexing_refuses_a_plain_tar_with_a_damaged_header(tmp_path):
    path, content = plain_shard(tmp_path)
    changed = bytearray(content)
    changed[content.index(b"sample-0002.")] ^= 1
    path.write_bytes(changed)
    with pytest.raises(DataError, match="cut off or damaged"):
        index_folder(tmp_path)


def test_indexing_refuses_a_packed_shard_with_a_changed_byte(tmp_path):
    write_shards(make_samples(3), tmp_path, split="train", samples_per_shard=3)
    path = tmp_path / "train-00000.tar.gz"
    content = path.read_bytes()
    for position in range(20, len(content), 29):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        with pytest.raises(DataError, match="train-00000"):
            index_folder(tmp_path)


def test_indexing_refuses_a_shard_that_is_there_plain_and_packed(tmp_path):
    path, content = plain_shard(tmp_path)
    path.write_bytes(content)
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="found both"):
        index_folder(tmp_path)


@pytest.mark.parametrize(
    "captions",
    [{"en": 5}, {"en": [1]}, {"en": [None]}, {"en": {"a": 1}}, {"en": [""]}, [5], [], {}],
    ids=str,
)
def test_captions_that_are_no_texts_are_refused(tmp_path, captions):
    path, content = plain_shard(tmp_path, count=1)
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content)) as old,
        tarfile.open(fileobj=buffer, mode="w") as new,
    ):
        for member in old:
            data = old.extractfile(member).read()
            if member.name.endswith(".json"):
                data = json.dumps({"captions": captions}).encode()
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="sample-0000"):
        open_as_it_is(path)[0]


@pytest.mark.parametrize(
    "uids", [["a.b"], ["style/a.b"], ["same", "same"]], ids=["dot", "dot in a folder", "twice"]
)
def test_uids_that_cannot_be_keys_are_not_written(tmp_path, uids):
    samples = [make_sample(number, uid=uid) for number, uid in enumerate(uids)]
    with pytest.raises(DataError, match="dot in its name or occurs twice"):
        write_shards(samples, tmp_path, split="train", samples_per_shard=5)
