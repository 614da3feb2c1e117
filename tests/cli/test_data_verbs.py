"""Show, index and check say what a source holds, whatever its kind."""

import json

import pytest

from tests.builders import (
    THINGS,
    encoded,
    make_image,
    make_samples,
    open_split,
    write_img2dataset,
    write_split,
    write_tar,
)
from vlm.cli.main import main

ZH = [zh for _, zh in THINGS]
EN = [en for en, _ in THINGS]


@pytest.fixture
def tars(tmp_path):
    return write_img2dataset(tmp_path / "tars", [*ZH[:4], *EN[4:6]], samples_per_shard=3)


@pytest.fixture
def table(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(make_image(number)))
    path = tmp_path / "caps.csv"
    path.write_text(f"image,zh,note\n0.png,{ZH[0]},a\n1.png,{ZH[1]},b\n2.png,,{EN[2]}\n")
    return path


def run(capsys, *words, code=0):
    """Return what a verb prints, or the one line of its error."""
    assert main(["data", *map(str, words)]) == code
    out, err = capsys.readouterr()
    assert out == "" if code else err == ""
    return err if code else out


def test_show_says_how_tars_are_understood(tars, capsys):
    assert run(capsys, "show", tars).splitlines() == [
        f"{tars}: tars, 6 samples in 2 shards",
        "field json.caption: zh or en by script",
        "zh: 4 captions of 4 samples",
        "en: 2 captions of 2 samples",
        f"00000/000000000: 40 x 40 pixels, {{'zh': ['{ZH[0]}']}}",
        f"00000/000000001: 40 x 40 pixels, {{'zh': ['{ZH[1]}']}}",
        f"00000/000000002: 40 x 40 pixels, {{'zh': ['{ZH[2]}']}}",
    ]


def test_a_path_may_hold_braces_and_look_like_something_else(tars, capsys, monkeypatch):
    monkeypatch.chdir(tars)
    for path in ("{00000..00001}.tar", "{00000,00001}.tar", "*.tar"):
        assert run(capsys, "show", path).startswith(f"{path}: tars, 6 samples in 2 shards")
    for path in ("123", "null", "{a: b}"):
        assert run(capsys, "show", path, code=2).startswith(f"vlm: {path}")


def test_show_counts_what_cannot_be_used_and_what_is_left_out(tmp_path, table, capsys):
    assert run(capsys, "show", table).splitlines()[1:4] == [
        "field zh: zh",
        "zh: 2 captions of 2 samples",
        f"cannot be used: 1 sample; the first: {table}, line 4: found no caption in 'image', "
        "'zh'; expected at least one",
    ]
    table.unlink()
    (tmp_path / "0.txt").write_text(ZH[0])
    (tmp_path / "notes.doc").touch()
    assert run(capsys, "show", tmp_path).splitlines()[:4] == [
        f"{tmp_path}: images, 3 samples in 1 shard",
        "field txt: zh or en by script",
        "zh: 1 caption of 1 sample",
        "left out: 1 with another suffix",
    ]


def test_show_counts_a_data_folder_by_its_split(tmp_path, capsys):
    write_split(tmp_path, make_samples(3))
    write_split(tmp_path, make_samples(2), split="val")
    said = run(capsys, "show", tmp_path, "--split", "val")
    assert said.startswith(f"{tmp_path}: data folder, 2 samples in 1 shard\nfield json.captions")
    assert "zh: 4 captions of 2 samples" in said


def test_fields_are_named_on_the_command_line_or_in_a_file(tmp_path, table, capsys):
    words = ["--captions.zh", "zh", "--language_of", "note", "--concept", "note"]
    said = run(capsys, "show", table, *words)
    config = tmp_path / "fields.yaml"
    config.write_text("captions: {zh: [zh]}\nlanguage_of: [note]\nconcept: note\n")
    assert run(capsys, "show", table, "--config", config) == said
    lines = said.splitlines()
    assert lines[1:5] == [
        "field zh: zh",
        "field note: zh or en by script",
        "en: 3 captions of 3 samples",
        "zh: 2 captions of 2 samples",
    ]
    assert lines[-1].endswith(f"{{'en': ['{EN[2]}']}}")
    assert "has no column 'gone'" in run(capsys, "show", table, "--captions.en", "gone", code=2)


def test_index_writes_a_manifest_of_a_folder_of_tars(tars, capsys):
    assert run(capsys, "index", tars) == "train: 6 samples in 2 shards\n"
    names = ["00000.tar", "00001.tar"]
    manifest = json.loads((tars / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["splits"]["train"]] == names
    assert sorted(path.name for path in (tars / "index").iterdir()) == [f"{n}.arrow" for n in names]
    assert open_split(tars)[4].captions == {"en": [EN[4]]}


def test_index_of_anything_else_is_in_the_cache(tars, table, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    assert run(capsys, "index", table) == "train: 3 samples in 1 shard\n"
    assert run(capsys, "index", f"{tars}/*.tar") == "train: 6 samples in 2 shards\n"
    assert len(list((tmp_path / "cache/index").glob("*.arrow"))) == 3
    assert not (tars / "manifest.json").exists()


def test_check_reads_every_sample_of_any_source(tars, table, capsys):
    assert run(capsys, "check", tars) == "train: 6 samples, all readable\n"
    said = run(capsys, "check", table, code=2)
    assert said.startswith(f"vlm: train: 1 of 3 samples cannot be read: {table}, line 4")
    (table.parent / "1.png").write_bytes(b"no image")
    assert "2 of 3 samples" in run(capsys, "check", table, code=2)


def test_check_refuses_a_changed_shard_once_and_keys_that_occur_twice(tmp_path, capsys):
    folder = write_split(tmp_path / "a", make_samples(6), samples_per_shard=3)
    assert run(capsys, "check", folder) == "train: 6 samples, all readable\n"
    path = folder / "train-00001.tar.gz"
    changed = bytearray(path.read_bytes())
    changed[40] ^= 1
    path.write_bytes(changed)
    said = run(capsys, "check", folder, code=2)
    assert said.startswith(f"vlm: train: 3 of 6 samples cannot be read: shard {path} is damaged")
    members = [("a.png", encoded(make_image(0))), ("a.txt", b"a cat")]
    for name in ("t-0.tar", "t-1.tar"):
        write_tar(tmp_path / "b" / name, members)
    assert "the key 'a' is in" in run(capsys, "index", tmp_path / "b", code=2)
