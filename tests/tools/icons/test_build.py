"""A build replaces only icon data folders, and writes the same bytes every time."""

import json

import pytest

from tests.builders import open_split
from tools.iconify import IconSet
from tools.icons import build
from tools.icons.build import build_icons
from tools.icons.concepts import Concept
from tools.icons.packages import PACKAGES
from tools.icons.styles import HELD_OUT_STYLE, OUTLINE
from vlm.data.manifest import read_manifest
from vlm.errors import DataError


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Replace the packages by eight bars in the outlined and the held-out style."""
    names = [f"bar-{width}" for width in range(1, 9)]
    concepts = tuple(
        Concept(
            key=name,
            group="shapes",
            captions={"en": (name,), "zh": ("条",)},
            icons=(name,),
            is_new=name == "bar-8",
        )
        for name in names
    )
    sets = {
        style: IconSet(
            icons={
                name: {"body": f'<path fill="{color}" d="M0 0h{5 * (row + 1)}v48H0z"/>'}
                for row, name in enumerate(names)
            },
            aliases={},
            width=48,
            height=48,
            name_by_code_points={},
        )
        for style, color in ((OUTLINE, "currentColor"), (HELD_OUT_STYLE, "#aaa"))
    }
    monkeypatch.setattr(build, "fetch", lambda package, cache: tmp_path)
    package = {"icons.json": b"[]", "LICENSE": b"Apache License"}
    monkeypatch.setattr(build, "read_archive", lambda path, pattern: package)
    monkeypatch.setattr(build, "read_concepts", lambda content: concepts)
    monkeypatch.setattr(build, "open_icon_sets", lambda cache: sets)


@pytest.mark.usefixtures("sources")
def test_a_build_writes_shards_manifest_groups_and_licences(tmp_path):
    out = tmp_path / "icons"
    build_icons(out, cache=tmp_path / "cache")
    splits = read_manifest(out).splits
    counts = {split: sum(entry.samples for entry in splits[split]) for split in splits}
    assert counts["test_style"] == 7
    assert counts["test_novel"] == counts["test_novel_style"] == 1
    assert counts["train"] + counts["val"] == 7
    sample = open_split(out, "test_novel_style")[0]
    assert sample.uid == f"{HELD_OUT_STYLE}/bar-8"
    assert (sample.source, sample.licence) == (HELD_OUT_STYLE, "Apache-2.0")
    assert (sample.concept, sample.labels) == ("bar-8", {"group": "shapes"})
    assert sample.captions == {"en": ["bar-8"], "zh": ["条"]}
    classes = json.loads((out / "classes.json").read_text(encoding="utf-8"))
    assert classes["groups"]["food"] == {"en": "food", "zh": "食物"}
    assert (out / "Apache-2.0.txt").read_bytes() == b"Apache License"


@pytest.mark.usefixtures("sources")
def test_two_builds_write_the_same_bytes(tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        build_icons(folder, cache=tmp_path / "cache")
    first, second = ({path.name: path.read_bytes() for path in f.iterdir()} for f in folders)
    assert first == second


@pytest.mark.usefixtures("sources")
def test_an_icon_data_folder_is_replaced(tmp_path):
    out = tmp_path / "icons"
    build_icons(out, cache=tmp_path / "cache")
    (out / "train-00007.tar.gz").touch()  # of an older build
    build_icons(out, cache=tmp_path / "cache")
    assert not (out / "train-00007.tar.gz").exists()


def test_an_emoji_data_folder_is_left_alone(tmp_path):
    for name in ("manifest.json", "classes.json", "LICENCES.md"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="is not an icon data folder"):
        build_icons(tmp_path, cache=tmp_path / "cache")


def test_the_licences_page_names_every_package(icons_folder):
    page = (icons_folder / "LICENCES.md").read_text(encoding="utf-8")
    missing = [
        package.name for package in PACKAGES if f"`{package.name}` {package.version}" not in page
    ]
    assert missing == []
