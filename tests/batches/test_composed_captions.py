"""Composed captions: templates filled with a sample's own captions, as often as asked."""

import random
from collections import Counter

import pytest

from tests.builders import make_sample
from vlm.batches.config import CaptionConfig
from vlm.batches.examples import choose_caption, composed
from vlm.errors import ConfigError

CAPTIONS = {"en": ["cat", "pet", "animal"], "zh": ["猫", "宠物"]}


def chosen(count=4000, *, captions=CAPTIONS, main_ratio=0.0, language="en", **fields):
    sample, config = make_sample(0, captions=captions), CaptionConfig(**fields)
    rng = random.Random(0)
    return Counter(
        choose_caption(sample, language, config, rng, main_ratio=main_ratio) for _ in range(count)
    )


def test_composed_captions_are_as_frequent_as_asked():
    counts = chosen(templates={"en": ("a {}",)}, composed_ratio=0.25, main_ratio=0.2)
    whole = sum(counts.values())
    assert counts["cat"] / whole == pytest.approx(0.2, abs=0.03)
    assert counts["pet"] / whole == pytest.approx(0.3, abs=0.03)
    for text in ("a cat", "a pet", "a animal"):
        assert counts[text] / whole == pytest.approx(0.8 * 0.25 / 3, abs=0.02)
    assert len(counts) == 6


def test_slots_of_one_language_get_different_captions():
    texts = set(chosen(templates={"en": ("{} and {}",)}, composed_ratio=1.0))
    assert texts == {
        f"{first} and {second}"
        for first in CAPTIONS["en"] for second in CAPTIONS["en"] if first != second
    }  # fmt: skip


def test_a_slot_that_names_a_language_gets_a_caption_of_it():
    texts = set(chosen(templates={"zh": ("一只{en}和{}",)}, composed_ratio=1.0, language="zh"))
    assert texts == {f"一只{en}和{zh}" for en in CAPTIONS["en"] for zh in CAPTIONS["zh"]}


def test_templates_with_more_slots_than_captions_are_passed_over():
    counts = chosen(captions={"en": ["cat"]}, templates={"en": ("{} and {}", "a {}")},
                    composed_ratio=1.0)  # fmt: skip
    assert counts.keys() == {"a cat"}
    only = chosen(captions={"en": ["cat"]}, templates={"en": ("{} and {}",)}, composed_ratio=1.0)
    assert only.keys() == {"cat"}


def test_a_sample_with_one_caption_is_composed_as_often_as_others():
    counts = chosen(captions={"en": ["cat"]}, templates={"en": ("a {}",)}, composed_ratio=0.5)
    assert counts["a cat"] / 4000 == pytest.approx(0.5, abs=0.03)


def test_other_languages_are_chosen_as_without_templates():
    plain, with_templates = (
        chosen(language="zh", main_ratio=0.5, templates=templates)
        for templates in ({}, {"en": ("a {}",)})
    )
    assert plain == with_templates


def test_without_a_caption_in_a_language_there_is_nothing_to_compose():
    assert chosen(captions={"zh": ["猫"]}, templates={"en": ("a {zh}",)}).keys() == {""}
    assert composed("{zh} {zh}", "en", {"zh": ["猫"]}, random.Random(0)) == ""


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"composed_ratio": 1.5}, r"composed_ratio is 1.5; expected a ratio in \[0, 1\]"),
        ({"templates": {"en": ("a cat",)}}, "the template 'a cat' has no place for a caption"),
        ({"templates": {"en": ("a {fr}",)}}, "the template 'a {fr}' has no place"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        CaptionConfig(**fields)
