"""A build replaces only emoji data folders, and writes the same bytes every time."""

import json

import pytest
from PIL import Image

from tests.builders import open_split
from tools.drawings import encode
from tools.emoji import build
from tools.emoji.build import build_emoji
from tools.emoji.packages import PACKAGES
from tools.emoji.styles import Drawing
from vlm.data.manifest import read_manifest
from vlm.errors import DataError


@pytest.fixture
def sources(monkeypatch, make_concept, tmp_path):
    """Replace the packages by a few squares in a training style and the held-out one."""
    concepts = tuple(make_concept(f"{0x1F300 + index:X}") for index in range(8))
    drawings = [
        Drawing(
            concept=concept,
            style=style,
            licence="MIT",
            image=encode(Image.new("RGB", (64, 64), (20 * index, 0, 0))),
        )
        for style in ("fluent_flat", "noto")
        for index, concept in enumerate(concepts)
    ]
    monkeypatch.setattr(build, "fetch", lambda package, cache: tmp_path)
    monkeypatch.setattr(build, "read_archive", lambda path, pattern: {})
    monkeypatch.setattr(build, "read_keywords", lambda files: {})
    monkeypatch.setattr(build, "read_concepts", lambda files, keywords: concepts)
    monkeypatch.setattr(build, "open_drawing_sets", lambda concepts, cache: ())
    monkeypatch.setattr(build, "distinct_drawings", lambda sets: iter(drawings))


@pytest.mark.usefixtures("sources")
def test_a_build_writes_shards_manifest_classes_and_licences(tmp_path):
    out = tmp_path / "emoji"
    build_emoji(out, cache=tmp_path / "cache")
    splits = read_manifest(out).splits
    assert {
        split: sum(entry.samples for entry in entries) for split, entries in splits.items()
    } == {
        "train": 6,
        "val": 1,
        "test_style": 7,
        "test_novel": 1,
        "test_novel_style": 1,
    }
    sample = open_split(out, "train")[0]
    assert sample.uid == f"fluent_flat/{sample.concept}"
    assert (sample.source, sample.licence) == ("fluent_flat", "MIT")
    assert sample.captions == {"en": ["thing"], "zh": ["thing"], "zh-Hant": ["thing"]}
    assert sample.labels == {
        "group": "objects",
        "subgroup": "tool",
        "class": "tool",
        "version": "1.0",
    }
    classes = json.loads((out / "classes.json").read_text(encoding="utf-8"))
    assert classes["classes"]["tool"] == {"en": "a tool", "zh": "工具"}


@pytest.mark.usefixtures("sources")
def test_two_builds_write_the_same_bytes(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        build_emoji(folder, cache=tmp_path / "cache")
    first, second = ({path.name: path.read_bytes() for path in f.iterdir()} for f in folders)
    assert first == second


@pytest.mark.usefixtures("sources")
def test_an_emoji_data_folder_is_replaced(tmp_path):
    out = tmp_path / "emoji"
    build_emoji(out, cache=tmp_path / "cache")
    (out / "train-00007.tar.gz").touch()  # of an older build
    build_emoji(out, cache=tmp_path / "cache")
    assert not (out / "train-00007.tar.gz").exists()
    assert not (out / "questions.yaml").exists()


@pytest.mark.usefixtures("sources")
def test_questions_outlive_a_build(tmp_path):
    out = tmp_path / "emoji"
    build_emoji(out, cache=tmp_path / "cache")
    (out / "questions.yaml").write_text("choose: []")
    build_emoji(out, cache=tmp_path / "cache")
    assert (out / "questions.yaml").read_text() == "choose: []"


@pytest.mark.parametrize("name", ["thesis.txt", "train-00000.tar.gz", "manifest.json"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"is not an emoji data folder \(it holds {name}\)"):
        build_emoji(tmp_path, cache=tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    out = tmp_path / "emoji"
    out.touch()
    with pytest.raises(DataError, match="is a file"):
        build_emoji(out, cache=tmp_path / "cache")


def test_the_licences_page_names_every_package(emoji_folder):
    page = (emoji_folder / "LICENCES.md").read_text(encoding="utf-8")
    missing = [
        package.name for package in PACKAGES if f"`{package.name}` {package.version}" not in page
    ]
    assert missing == []
