"""Conditions choose samples, and one that no sample can meet or miss is refused."""

import pytest

from tests.builders import make_sample
from vlm.data.conditions import Conditions
from vlm.data.index import table_of
from vlm.errors import DataError

SAMPLES = [
    make_sample(0, concept="a", labels={"group": "even"}),
    make_sample(1, concept="b", labels={"group": "odd", "tone": "dark"}),
    make_sample(2, concept="a", labels={"group": "even"}),
]


INDEX = table_of(
    {name: getattr(sample, name) for name in ("uid", "captions", "concept", "source", "labels")}
    for sample in SAMPLES
)


def numbers_where(*where):
    conditions = Conditions(where)
    rows = conditions.rows_of(INDEX)
    conditions.check_keys("the split")
    return rows.tolist()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ((), [0, 1, 2]),
        (("group=even",), [0, 2]),
        (("group!=even",), [1]),
        (("concept=b", "group=odd"), [1]),
        (("tone!=dark",), [0, 2]),  # a label that only some have
        (("tone=light",), []),
        (("languages=en+zh",), [0, 1, 2]),
        (("languages!=en+zh",), []),
        (("languages=zh",), []),
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
        "concept, languages, group, tone"
    )


def test_the_values_of_conditions_may_hold_signs():
    rows = [{"uid": "a", "labels": {"formula": value}} for value in ("a=b!", "a")]
    assert Conditions(["formula=a=b!"]).rows_of(table_of(rows)).tolist() == [0]


def test_a_label_goes_before_a_field_of_its_name():
    rows = [{"uid": "a", "source": "photo", "labels": labels} for labels in ({"source": "x"}, {})]
    assert Conditions(["source=photo"]).rows_of(table_of(rows)).tolist() == [1]


@pytest.mark.parametrize("text", ["", "source", "=photo", "source=", "!=photo", "source!="])
def test_a_text_that_is_no_condition_is_refused(text):
    with pytest.raises(DataError, match="is not a condition; expected KEY=VALUE or KEY!=VALUE"):
        Conditions([text])


def test_a_sample_that_cannot_be_used_stays_so_that_its_reader_says_why():
    rows = [{"uid": "a", "error": "it is damaged"}, {"uid": "b", "source": "photo", "captions": {}}]
    index = table_of([row | {"concept": "", "labels": {}} for row in rows])
    assert Conditions(["source=photo"]).rows_of(index).tolist() == [0, 1]
    assert Conditions(["source=drawing"]).rows_of(index).tolist() == [0]
