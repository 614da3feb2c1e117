"""A manifest comes back as it was written; anything else is refused by its name."""

import json

import pytest

from vlm.data.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from vlm.errors import DataError


def entry(number: int) -> ShardEntry:
    return ShardEntry(
        name=f"train-{number:05d}.tar", samples=number + 1, bytes=1000 + number, sha256="ab" * 32
    )


MANIFEST = Manifest(splits={"训练": (entry(1), entry(0)), "val": (entry(2),)})


def test_a_manifest_comes_back_with_its_order(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    manifest = read_manifest(tmp_path)
    assert manifest == MANIFEST
    assert list(manifest.splits) == ["训练", "val"]
    assert manifest.shards_of("训练", tmp_path) == (entry(1), entry(0))


def test_a_manifest_is_written_to_the_same_bytes_each_time(tmp_path):
    write_manifest(tmp_path / "a", MANIFEST)
    write_manifest(tmp_path / "b", read_manifest(tmp_path / "a"))
    first, second = ((tmp_path / name / "manifest.json").read_bytes() for name in "ab")
    assert first == second
    assert "训练" in first.decode()


def test_a_manifest_is_json_that_others_can_read(tmp_path):
    write_manifest(tmp_path, Manifest(splits={"val": (entry(0),)}))
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "format": 1,
        "splits": {
            "val": [{"name": "train-00000.tar", "samples": 1, "bytes": 1000, "sha256": "ab" * 32}]
        },
    }


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(DataError, match="has no split 'test'; its splits are 训练, val"):
        MANIFEST.shards_of("test", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"format": 1}', b'{"splits": {}}',
        b'{"format": 1, "splits": []}', b'{"format": 1, "splits": {"val": 3}}',
        b'{"format": 1, "splits": {"val": [{"name": "a.tar"}]}}',
        b'{"format": 1, "splits": {"val": ["a.tar"]}}',
    ],
    ids=[
        "empty", "cut off", "not UTF-8", "a list", "null", "no format", "no splits",
        "no format but splits", "splits are a list", "shards are a number",
        "an entry lacks fields", "an entry is a string",
    ],
)  # fmt: skip
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(DataError, match=rf"{tmp_path}/manifest\.json is not a manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_refused_with_both_numbers(tmp_path, version):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": version, "splits": {}}))
    with pytest.raises(DataError, match=f"has format {version}; this version reads format 1"):
        read_manifest(tmp_path)


def test_a_missing_manifest_says_what_writes_one(tmp_path):
    with pytest.raises(DataError, match=rf"has no manifest\.json; `vlm data index {tmp_path}`"):
        read_manifest(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/gone is not a folder"):
        read_manifest(tmp_path / "gone")
