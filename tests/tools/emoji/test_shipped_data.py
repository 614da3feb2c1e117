"""What `data/emoji` holds besides what `test_shipped_sets` asks of every set."""

import json
from collections import Counter

import pytest

from tools.emoji.classes import class_table
from tools.emoji.concepts import family_of, region_of
from tools.splits import SPLITS

LICENCES = {
    "emojione": {"CC-BY-4.0"},
    "fluent_3d": {"MIT"},
    "fluent_flat": {"MIT"},
    "fluent_high_contrast": {"MIT"},
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


def test_every_style_has_its_number_of_images_and_its_licence(samples):
    assert Counter(sample.source for sample in samples) == {
        "emojione": 1340,
        "fluent_3d": 1606,
        "fluent_flat": 1592,
        "fluent_high_contrast": 1579,
        "fxemoji": 602,
        "noto": 1898,
        "noto_blob": 1195,
        "twemoji": 1880,
    }
    for sample in samples:
        assert sample.licence in LICENCES[sample.source]


def test_a_sample_is_named_after_its_style_and_concept(samples):
    assert len({sample.uid for sample in samples}) == len(samples)
    assert all(sample.uid == f"{sample.source}/{sample.concept}" for sample in samples)


def test_a_concept_has_the_main_captions_of_its_emoji(samples):
    whale = next(sample for sample in samples if sample.concept == "1F433")
    assert (whale.captions["en"][0], whale.captions["zh"][0]) == ("spouting whale", "喷水的鲸")


def test_every_style_has_its_licence(samples):
    for sample in samples:
        assert sample.licence in LICENCES[sample.source]


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
