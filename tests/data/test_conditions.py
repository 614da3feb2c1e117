"""Conditions choose samples, and one that no sample can meet or miss is refused."""

import pytest

from tests.builders import make_sample
from vlm.data.conditions import parse_condition, samples_where
from vlm.errors import DataError

SAMPLES = [
    make_sample(0, concept="a", labels={"group": "even"}),
    make_sample(1, concept="b", labels={"group": "odd", "tone": "dark"}),
    make_sample(2, concept="a", labels={"group": "even"}),
]


def numbers_where(*where):
    chosen = list(samples_where(SAMPLES, where, name="the split"))
    return [number for number, sample in enumerate(SAMPLES) if sample in chosen]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ((), [0, 1, 2]),
        (("group=even",), [0, 2]),
        (("group!=even",), [1]),
        (("concept=b", "group=odd"), [1]),
        (("tone!=dark",), [0, 2]),  # a label that only some have
        (("tone=light",), []),
    ],
    ids=str,
)
def test_samples_meet_all_conditions(where, expected):
    assert numbers_where(*where) == expected


@pytest.mark.parametrize("condition", ["grop!=even", "grop=even"])
def test_a_key_that_no_sample_has_is_refused_with_those_there_are(condition):
    with pytest.raises(DataError) as caught:
        numbers_where("group=even", condition)
    assert str(caught.value) == (
        f"no sample of the split has 'grop', which {condition!r} asks for; expected one of source, "
        "concept, group, tone"
    )


def test_the_values_of_conditions_may_hold_signs():
    holds = parse_condition("formula=a=b!")
    assert holds(make_sample(0, labels={"formula": "a=b!"}))
    assert not holds(make_sample(0, labels={"formula": "a"}))


@pytest.mark.parametrize("text", ["", "source", "=photo", "source=", "!=photo", "source!="])
def test_a_text_that_is_no_condition_is_refused(text):
    with pytest.raises(DataError, match="is not a condition; expected KEY=VALUE or KEY!=VALUE"):
        parse_condition(text)
