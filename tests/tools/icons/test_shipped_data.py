"""What `data/icons` holds besides what `test_shipped_sets` asks of every set."""

import json

import pytest

from tools.icons.concepts import read_groups, read_table
from tools.splits import SPLITS


@pytest.fixture(scope="module")
def samples(icon_splits):
    return [sample for split in SPLITS for sample in icon_splits[split]]


def concepts_of(samples):
    return {sample.concept for sample in samples}


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


def test_a_concept_has_its_names_and_every_image_its_licence(samples):
    seat = next(sample for sample in samples if sample.concept == "baby-car-seat")
    assert (seat.captions["en"][0], seat.captions["zh"][0]) == ("baby car seat", "婴儿安全座椅")
    assert {sample.licence for sample in samples} == {"Apache-2.0"}


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


def test_labels_are_groups_of_the_table(samples, icons_folder):
    table = json.loads((icons_folder / "classes.json").read_text(encoding="utf-8"))
    assert table == {"groups": {group.key: dict(group.names) for group in read_groups()}}
    for sample in samples:
        assert set(sample.labels) == {"group"}
        assert sample.labels["group"] in table["groups"]


def test_every_group_can_be_tested_in_the_held_out_style(icon_splits):
    tested = {sample.labels["group"] for sample in icon_splits["test_style"]}
    assert tested == {group.key for group in read_groups()}
