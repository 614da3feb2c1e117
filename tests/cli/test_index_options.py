"""Options of indexes are filled in where an index is asked for, and refused where none is."""

import pytest

from vlm.cli import eval_index, eval_retrieval
from vlm.cli.parsing import parse
from vlm.errors import ConfigError
from vlm.evaluation.config import IndexPlan


def plan_of(*words, verb=eval_retrieval):
    return parse(verb.Options, ["folder", *words], prog="vlm", description="").index_plan()


def test_without_an_index_there_is_no_plan():
    assert plan_of() is None


def test_what_is_not_given_is_the_plans_default():
    assert plan_of("--index", "Flat") == IndexPlan(factories=("Flat",))
    assert plan_of(verb=eval_index) == IndexPlan(factories=("auto",))


def test_what_is_given_is_heeded():
    words = ["--target_recall", "0.5", "--memory", "2MB", "--sweep", "--json"]
    expected = IndexPlan(factories=("Flat",), target_recall=0.5, memory="2MB", sweep=True)
    assert plan_of("--index", "Flat", *words) == expected


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--target_recall", "0.95"], "target_recall"),
        (["--memory", "1GiB"], "memory"),
        (["--sweep", "--memory", "1GiB", "--json"], "memory and sweep"),
    ],
    ids=" ".join,
)
def test_options_of_indexes_without_one_are_refused(words, found):
    with pytest.raises(ConfigError, match=f"^found {found} without index; expected --index"):
        plan_of(*words)


def test_a_sweep_that_nothing_would_show_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found sweep, which a table does not show; expected"):
        plan_of("--index", "Flat", "--sweep")
    assert plan_of("--index", "Flat", "--sweep", "--out", str(tmp_path)).sweep
