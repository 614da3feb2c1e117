"""A style and some families of concepts are kept for testing, the same ones every time."""

from collections import Counter

import pytest

from tools.emoji.concepts import family_of
from tools.emoji.splits import held_out_concepts


@pytest.fixture
def tools(make_concept):
    return [make_concept(f"{0x1F300 + index:X}") for index in range(50)]


def test_twelve_percent_of_the_families_of_a_subgroup_are_held_out(tools):
    assert len(held_out_concepts(tools)) == 6


def test_the_choice_does_not_depend_on_the_order_of_the_concepts(tools):
    assert held_out_concepts(tools) == held_out_concepts(tools[::-1])


def test_a_family_is_held_out_whole(make_concept):
    roles = [f"{0x1F680 + index:X}" for index in range(25)]
    concepts = [
        make_concept(f"{person}-200D-{role}") for role in roles for person in ("1F468", "1F469")
    ]
    held_out = held_out_concepts(concepts)
    members = Counter(family_of(key) for key in held_out)
    assert list(members.values()) == [2, 2, 2]


def test_a_family_in_two_subgroups_is_decided_in_the_first(make_concept):
    def walkers(subgroup, suffix):
        keys = (f"{0x1F300 + index:X}{suffix}" for index in range(50))
        return [make_concept(key, subgroup=subgroup) for key in keys]

    both = held_out_concepts([*walkers("person", ""), *walkers("sport", "-200D-2640")])
    assert len({family_of(key) for key in both}) == 6
    assert len(both) == 12


@pytest.mark.parametrize("group", ["flags", "symbols"])
def test_flags_and_symbols_are_never_held_out(make_concept, group):
    concepts = [make_concept(f"{0x1F300 + index:X}", group=group) for index in range(50)]
    assert held_out_concepts(concepts) == frozenset()
