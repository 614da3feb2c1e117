"""The shipped `data/icons` is whole, bilingual, and keeps its test concepts out of training."""

import hashlib
import io
import json
from collections import Counter

import pytest
from PIL import Image

from tools.icons.concepts import read_groups, read_table
from tools.icons.styles import HELD_OUT_STYLE, STYLES
from tools.splits import SPLITS
from vlm.data.manifest import read_manifest


@pytest.fixture(scope="module")
def samples(icon_splits):
    return [sample for split in SPLITS for sample in icon_splits[split]]


def concepts_of(samples):
    return {sample.concept for sample in samples}


def test_every_split_has_its_number_of_images(icon_splits):
    assert {split: len(samples) for split, samples in icon_splits.items()} == {
        "train": 2511,
        "val": 121,
        "test_style": 797,
        "test_novel": 249,
        "test_novel_style": 76,
    }


def test_every_style_has_its_number_of_images(samples):
    assert Counter(sample.source for sample in samples) == {
        "icon_park": 867,
        "icon_park_outline": 1157,
        "icon_park_solid": 873,
        "icon_park_twotone": 857,
    }
    assert {sample.licence for sample in samples} == {"Apache-2.0"}


def test_the_set_is_small_enough_for_a_repository(icons_folder):
    assert sum(path.stat().st_size for path in icons_folder.iterdir()) < 8_000_000


def test_the_manifest_holds_the_hash_of_every_shard(icons_folder):
    listed = {
        entry.name: entry.sha256
        for entries in read_manifest(icons_folder).splits.values()
        for entry in entries
    }
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in icons_folder.glob("*.tar.gz")
    }
    assert listed == found


def test_a_sample_is_named_after_its_style_and_icon(samples):
    icon_of_concept = {
        icon: name
        for group in read_groups()
        for name, entry in group.concepts.items()
        for icon in entry["icons"]
    }
    assert len({sample.uid for sample in samples}) == len(samples)
    for sample in samples:
        style, _, icon = sample.uid.partition("/")
        assert style == sample.source
        assert icon_of_concept[icon] == sample.captions["en"][0]


def test_every_concept_has_its_own_name_in_chinese_and_english(samples):
    names = {
        sample.concept: (sample.captions["en"][0], sample.captions["zh"][0]) for sample in samples
    }
    assert len(names) == 848
    assert len({english for english, _ in names.values()}) == 848
    assert len({chinese for _, chinese in names.values()}) == 848
    assert names["baby-car-seat"] == ("baby car seat", "婴儿安全座椅")


def test_captions_are_distinct_texts_and_equal_for_all_images_of_a_concept(samples):
    captions = {}
    for sample in samples:
        assert set(sample.captions) == {"en", "zh"}
        for texts in sample.captions.values():
            assert all(texts)
            assert len(set(texts)) == len(texts)
        assert captions.setdefault(sample.concept, sample.captions) == sample.captions


def test_the_held_out_style_is_never_trained_on(icon_splits):
    for split, samples in icon_splits.items():
        styles = {sample.source for sample in samples}
        assert (styles == {HELD_OUT_STYLE}) == split.endswith("_style")
        assert (HELD_OUT_STYLE in styles) == split.endswith("_style")


def test_held_out_concepts_are_never_trained_on(icon_splits):
    seen = concepts_of([*icon_splits["train"], *icon_splits["val"]])
    novel = concepts_of(icon_splits["test_novel"] + icon_splits["test_novel_style"])
    assert len(novel) == len(read_table("selection.yaml")["new"]) == 60
    assert novel.isdisjoint(seen)
    assert concepts_of(icon_splits["test_style"]) <= seen


def test_training_on_icons_shows_no_new_concept_of_the_emoji_by_its_name(icon_splits, emoji_splits):
    def names(samples):
        return {
            sample.captions[language][0].lower() for sample in samples for language in ("en", "zh")
        }

    novel = names(emoji_splits["test_novel"] + emoji_splits["test_novel_style"])
    assert names(icon_splits["train"] + icon_splits["val"]).isdisjoint(novel)
    assert len(names(icon_splits["test_novel"]) & novel) > 30


def test_every_shard_mixes_the_styles(icon_splits):
    first = icon_splits["train"][:100]
    assert {sample.source for sample in first} == set(STYLES) - {HELD_OUT_STYLE}


def test_labels_are_groups_of_the_table(samples, icons_folder):
    table = json.loads((icons_folder / "classes.json").read_text(encoding="utf-8"))
    assert table == {"groups": {group.key: dict(group.names) for group in read_groups()}}
    for sample in samples:
        assert set(sample.labels) == {"group"}
        assert sample.labels["group"] in table["groups"]


def test_every_group_can_be_tested_in_the_held_out_style(icon_splits):
    tested = {sample.labels["group"] for sample in icon_splits["test_style"]}
    assert tested == {group.key for group in read_groups()}


@pytest.mark.slow
def test_every_image_is_64_pixels_wide_and_high_and_shows_something(samples):
    for sample in samples:
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64)), sample.uid
            darkest = image.convert("L").getextrema()[0]
        assert darkest < 60, sample.uid


def test_no_style_shows_one_image_twice(samples):
    shown = Counter((sample.source, sample.image) for sample in samples)
    assert max(shown.values()) == 1
