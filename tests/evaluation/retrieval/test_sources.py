"""Data folders and published files are opened alike, and no setting is passed over in silence."""

import base64
import json
from pathlib import Path

import pytest

from tests.builders import THINGS, encoded, make_image, make_samples, of_split, write_split
from tests.evaluation.retrieval.benchmarks.opened import opened
from vlm.errors import ConfigError, DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.pairs import pairs_of_split
from vlm.evaluation.retrieval.sources import (
    open_source,
    parse_source,
    sources_of,
)

ASKED = ("zh", "en")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("folder"), make_samples(24), split="test_style")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Four images with captions in two languages, two of them equal in Chinese."""
    path = tmp_path_factory.mktemp("table") / "mine.csv"
    rows = ["image,caption_en,caption_zh"]
    for number, (en, zh) in enumerate(THINGS[:4]):
        make_image(number).save(path.parent / f"{number}.png")
        rows.append(f"{number}.png,{en.upper()},{THINGS[0][1] if number == 1 else zh}")
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """One image in Chinese-CLIP's layout, which holds the images itself."""
    path = tmp_path_factory.mktemp("packed")
    (path / "valid_imgs.tsv").write_bytes(b"7\t" + base64.b64encode(encoded(make_image(0))) + b"\n")
    line = {"text_id": 1, "text": THINGS[0][1], "image_ids": [7]}
    (path / "valid_texts.jsonl").write_text(json.dumps(line) + "\n")
    return path


def asked(pairs):
    return {
        language: (list(texts.texts), texts.matches.tolist())
        for language, texts in pairs.texts.items()
    }


def test_a_data_folder_is_asked_in_the_models_languages_under_the_name_of_its_split(folder):
    found = open_source(RetrievalSource(path=str(folder)), languages=["en", "fr"])
    assert (found.kind, found.split) == ("data folder", "test_style")
    assert found.findings == {}
    assert asked(found) == asked(pairs_of_split(of_split(folder, "test_style"), languages=["en"]))


def test_conditions_languages_and_the_split_of_a_data_folder_are_heeded(folder):
    source = RetrievalSource(
        path=str(folder),
        name="photos",
        split="test_style",
        where=["source=photo"],
        languages=["zh"],
    )
    found = open_source(source, languages=ASKED)
    expected = pairs_of_split(
        of_split(folder, "test_style", where=["source=photo"]), languages=["zh"]
    )
    assert asked(found) == asked(expected)
    assert len(found.images) == 12


def test_languages_that_a_data_folder_lacks_are_refused_if_they_were_asked_for(folder):
    with pytest.raises(DataError, match=r"has no captions in fr among .*; found zh$"):
        open_source(RetrievalSource(path=str(folder), languages=["fr", "zh"]), languages=ASKED)


def test_settings_become_plain_values(table):
    source = RetrievalSource(path=str(table), images=table.parent, where=["a=b"])
    given = {name: value for name, value in source.as_record().items() if value is not None}
    expected = {"path": str(table), "name": "", "images": str(table.parent), "where": ["a=b"]}
    assert given == expected


def test_no_source_at_all_is_refused():
    with pytest.raises(ConfigError, match="no benchmark is given; expected at least one NAME=PATH"):
        sources_of([])


def test_the_files_of_a_benchmark_are_asked_with_what_was_found(table):
    found = open_source(RetrievalSource(path=str(table)), languages=["fr"])
    assert (found.kind, found.split) == ("table", "")
    assert asked(found) == asked(opened(table))
    assert found.findings["images_listed"] == 4
    assert found.findings["duplicate_captions"] == 1
    assert "missing_images" not in found.findings
    phrases = found.describe_findings()
    assert {"4 images listed", "1 duplicate captions"} <= set(phrases)
    assert all(note in phrases for note in found.findings.get("notes", ()))


def test_the_settings_of_a_benchmark_are_heeded(table, tmp_path):
    moved = tmp_path / "moved.csv"
    moved.write_bytes(table.read_bytes() + "\nmissing.png,nothing,没有".encode())
    source = RetrievalSource(
        path=str(moved), kind="table", images=table.parent, languages=["zh", "en"],
        duplicates="by string", lower_case=True, allowed_share=0.2,
    )  # fmt: skip
    found = open_source(source, languages=ASKED)
    assert list(found.texts["en"].texts) == [en for en, _ in THINGS[:4]]
    expected = [[0, 0], [0, 1], [1, 0], [1, 1], [2, 2], [3, 3]]
    assert found.texts["zh"].matches.tolist() == expected
    assert found.duplicates == "by string"
    assert found.findings["missing_images"] == 1
    (example,) = [each for each in found.describe_findings() if "such as" in each]
    assert example.startswith("missing images such as ")
    assert "missing.png" in example
    for share, counts in ((0.0, "1 of 5"), (None, "1 of 5")):
        strict = RetrievalSource(path=str(moved), images=table.parent, allowed_share=share)
        with pytest.raises(DataError, match=f"{counts} images are not on the disk"):
            open_source(strict, languages=ASKED)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lower_case": True}, "found lower_case, which is for the files of a benchmark"),
        ({"images": Path("x"), "duplicates": "by id"}, "found images and duplicates, which are"),
        ({"kind": "table"}, "found kind, which is for the files of a benchmark"),
        ({"allowed_share": 0.5}, "found allowed_share, which is"),
    ],
    ids=str,
)
def test_settings_of_benchmarks_are_refused_for_a_data_folder(folder, setting, said):
    with pytest.raises(ConfigError, match=r"is a data folder; found .*; expected none") as caught:
        open_source(RetrievalSource(path=str(folder), **setting), languages=ASKED)
    assert said in str(caught.value)


def test_settings_that_a_benchmark_would_ignore_are_refused(table, packed):
    with pytest.raises(ConfigError, match=r"a benchmark \(table\); found where, which is for data"):
        open_source(RetrievalSource(path=str(table), where=["source=noto"]), languages=ASKED)
    with pytest.raises(ConfigError, match=r"\(chinese-clip\) that holds its images; found image"):
        open_source(RetrievalSource(path=str(packed), images=packed), languages=ASKED)


def test_settings_that_say_nothing_may_stand(folder, table):
    for path in (folder, table):
        source = RetrievalSource(path=str(path), where=(), lower_case=False)
        assert open_source(source, languages=ASKED).texts.keys() == {"zh", "en"}


@pytest.mark.parametrize("share", [-0.1, 1.01])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match=rf"allowed_share is {share}; expected a ratio in"):
        RetrievalSource(path="x", allowed_share=share)


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("MUGE=/data/muge", "MUGE", "/data/muge"),
        ("/data/muge", "", "/data/muge"),
        ("/data/seed=1/muge", "", "/data/seed=1/muge"),
        ("a=b=c/d", "a", "b=c/d"),
    ],
)
def test_names_go_before_paths(text, name, path):
    assert parse_source(text) == RetrievalSource(name=name, path=path)


@pytest.mark.parametrize("text", ["MUGE=", "=muge", ""])
def test_a_text_without_a_name_or_a_path_is_refused(text):
    with pytest.raises(ConfigError, match="names no benchmark; expected NAME=PATH or PATH"):
        parse_source(text)


def test_sources_without_a_name_get_one(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = sources_of([str(folder), "nowhere/test.jsonl", "."], folder_split="val")
    assert [source.name for source in named] == ["val", "test", tmp_path.name]


def test_two_of_one_name_are_refused(folder, table):
    with pytest.raises(ConfigError, match=r"two benchmarks are called mine: .*; name them by NAME"):
        sources_of([str(table), f"mine={folder}"])


def test_settings_in_common_are_for_those_that_give_none(folder, table):
    own = RetrievalSource(
        path=str(table), split="a", lower_case=False, allowed_share=0.0, languages=()
    )
    common = {"split": "b", "lower_case": True, "allowed_share": 0.3, "languages": ["zh"]}
    first, second, third = sources_of([own, f"x={table}", f"y={folder}"], common=common)
    assert (first.split, first.lower_case, first.allowed_share) == ("a", False, 0.0)
    assert first.languages == ()
    assert (second.split, second.lower_case, second.allowed_share) == ("b", True, 0.3)
    assert (third.split, third.languages) == ("b", ["zh"])
    assert sources_of([f"y={folder}"], folder_split="val")[0].split == "val"


def test_the_only_split_of_a_data_folder_is_asked_where_none_is_named(tmp_path):
    write_split(tmp_path, make_samples(4), split="mine")
    (source,) = sources_of([str(tmp_path)])
    assert (source.split, source.name) == ("mine", "mine")
    (source,) = sources_of([str(tmp_path)], folder_split="val")
    assert source.split == "val"
