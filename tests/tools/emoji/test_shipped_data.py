"""The shipped `data/emoji` is whole, bilingual, and keeps its test concepts out of training."""

import hashlib
import io
import json
from collections import Counter

import pytest
from PIL import Image

from tools.emoji.classes import class_table
from tools.emoji.concepts import family_of, region_of
from tools.emoji.splits import HELD_OUT_STYLE
from tools.splits import SPLITS
from vlm.data.manifest import read_manifest

LICENCES = {
    "emojione": {"CC-BY-4.0"},
    "fluent_3d": {"MIT"},
    "fluent_flat": {"MIT"},
    "fxemoji": {"CC-BY-4.0"},
    "noto": {"Apache-2.0", "OFL-1.1"},
    "noto_blob": {"Apache-2.0"},
    "twemoji": {"CC-BY-4.0"},
}


@pytest.fixture(scope="module")
def samples(emoji_splits):
    return [sample for split in SPLITS for sample in emoji_splits[split]]


def concepts_of(samples):
    return {sample.concept for sample in samples}


def test_every_split_has_its_number_of_images(emoji_splits):
    assert {split: len(samples) for split, samples in emoji_splits.items()} == {
        "train": 7053,
        "val": 365,
        "test_style": 1726,
        "test_novel": 797,
        "test_novel_style": 172,
    }


def test_every_style_has_its_number_of_images_and_its_licence(samples):
    assert Counter(sample.source for sample in samples) == {
        "emojione": 1340,
        "fluent_3d": 1606,
        "fluent_flat": 1592,
        "fxemoji": 602,
        "noto": 1898,
        "noto_blob": 1195,
        "twemoji": 1880,
    }
    for sample in samples:
        assert sample.licence in LICENCES[sample.source]


def test_the_set_is_small_enough_for_a_repository(emoji_folder):
    assert sum(path.stat().st_size for path in emoji_folder.iterdir()) < 25_000_000


def test_the_manifest_holds_the_hash_of_every_shard(emoji_folder):
    listed = {
        entry.name: entry.sha256
        for entries in read_manifest(emoji_folder).splits.values()
        for entry in entries
    }
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in emoji_folder.glob("*.tar.gz")
    }
    assert listed == found


def test_a_sample_is_named_after_its_style_and_concept(samples):
    assert len({sample.uid for sample in samples}) == len(samples)
    assert all(sample.uid == f"{sample.source}/{sample.concept}" for sample in samples)


def test_every_concept_has_its_own_name_in_chinese_and_english(samples):
    names = {
        sample.concept: (sample.captions["en"][0], sample.captions["zh"][0]) for sample in samples
    }
    assert len(names) == 1902
    assert len({english for english, _ in names.values()}) == 1902
    assert len({chinese for _, chinese in names.values()}) == 1902
    assert names["1F433"] == ("spouting whale", "喷水的鲸")


def test_captions_are_distinct_texts_and_equal_in_every_style(samples):
    captions = {}
    for sample in samples:
        assert set(sample.captions) == {"en", "zh", "zh-Hant"}
        for texts in sample.captions.values():
            assert all(texts)
            assert len(set(texts)) == len(texts)
        assert captions.setdefault(sample.concept, sample.captions) == sample.captions


def test_the_held_out_style_is_never_trained_on(emoji_splits):
    for split, samples in emoji_splits.items():
        styles = {sample.source for sample in samples}
        assert (styles == {HELD_OUT_STYLE}) == split.endswith("_style")
        assert (HELD_OUT_STYLE in styles) == split.endswith("_style")


def test_held_out_concepts_and_their_families_are_never_trained_on(emoji_splits):
    trained = [*emoji_splits["train"], *emoji_splits["val"]]
    seen = concepts_of(trained)
    families = {
        family_of(sample.concept)
        for sample in trained
        if sample.labels["group"] not in ("flags", "symbols")
    }
    novel = concepts_of(emoji_splits["test_novel"] + emoji_splits["test_novel_style"])
    assert len(novel) == 172
    assert novel.isdisjoint(seen | concepts_of(emoji_splits["test_style"]))
    assert {family_of(key) for key in novel}.isdisjoint(families)


def test_the_new_style_shows_concepts_that_training_styles_show(emoji_splits):
    seen = concepts_of([*emoji_splits["train"], *emoji_splits["val"]])
    assert concepts_of(emoji_splits["test_style"]) <= seen


def test_no_style_borrows_the_flags_of_the_held_out_one(samples):
    assert not [s.uid for s in samples if s.source == "fluent_3d" and region_of(s.concept)]


def test_every_shard_mixes_the_styles(emoji_splits):
    first = emoji_splits["train"][:500]
    assert len({sample.source for sample in first}) == 6


def test_labels_are_groups_and_classes_of_the_table(samples, emoji_folder):
    table = json.loads((emoji_folder / "classes.json").read_text(encoding="utf-8"))
    assert table == class_table().record()
    for sample in samples:
        assert sample.labels["group"] in table["groups"]
        expected = class_table().class_of_subgroup.get(sample.labels["subgroup"])
        assert sample.labels.get("class") == expected


def test_every_class_can_be_tested_in_the_held_out_style(emoji_splits):
    tested = emoji_splits["test_style"] + emoji_splits["test_novel_style"]
    assert {sample.labels.get("class") for sample in tested} >= set(class_table().classes)


@pytest.mark.slow
def test_every_image_is_64_pixels_wide_and_high_and_shows_something(samples):
    for sample in samples:
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64)), sample.uid
            darkest = image.convert("L").getextrema()[0]
        assert darkest < 240, sample.uid


def test_no_style_shows_one_image_for_two_concepts(samples):
    shown = Counter((sample.source, sample.image) for sample in samples)
    assert max(shown.values()) == 1
