"""No tensor is lost, invented or bent without being named."""

import pytest
import torch

from vlm.checkpoints.accounting import Origin, to_ours, to_theirs
from vlm.errors import CheckpointError

ORIGINS = {
    "plain": Origin(("p",)),
    "turned": Origin(("t",), transposed=True),
    "joined": Origin(("q", "k", "v")),
}
THEIRS = {
    "p": torch.arange(2.0),
    "t": torch.arange(6.0).view(2, 3),
    **{name: torch.full((2, 4), float(number)) for number, name in enumerate("qkv")},
}
EXPECTED = {"plain": torch.empty(2), "turned": torch.empty(3, 2), "joined": torch.empty(6, 4)}


def take(theirs, **options):
    return to_ours(theirs, EXPECTED, ORIGINS.__getitem__, **options)


def test_tensors_are_renamed_turned_and_joined():
    ours, dropped = take(THEIRS)
    assert ours["plain"].equal(THEIRS["p"])
    assert ours["turned"].equal(THEIRS["t"].T)
    assert ours["joined"].equal(torch.cat([THEIRS[name] for name in "qkv"]))
    assert dropped == []


def test_scattering_undoes_gathering():
    theirs = to_theirs(take(THEIRS)[0], ORIGINS.__getitem__)
    assert theirs.keys() == THEIRS.keys()
    assert all(theirs[name].equal(THEIRS[name]) for name in THEIRS)
    assert all(tensor.is_contiguous() for tensor in theirs.values())


def test_what_is_allowed_is_dropped_and_named():
    ours, dropped = take(THEIRS | {"head.bias": torch.zeros(1)}, allowed=[r"head\..*"])
    assert dropped == ["head.bias"]
    assert ours.keys() == EXPECTED.keys()


def test_a_pattern_allows_whole_names_only():
    with pytest.raises(CheckpointError, match=r"1 unexpected \(my\.head\.bias\)"):
        take(THEIRS | {"my.head.bias": torch.zeros(1)}, allowed=[r"head\..*"])


def test_everything_wrong_is_said_at_once():
    theirs = THEIRS | {"p": torch.zeros(3), "new": torch.zeros(1)}
    del theirs["k"]
    with pytest.raises(CheckpointError) as caught:
        take(theirs)
    assert str(caught.value) == (
        "the tensors do not fit the model: 1 missing (k), 1 unexpected (new), "
        "1 of another shape (p is [3], as plain [2])"
    )


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("q", torch.zeros(3, 4), r"q, k, v is \[3, 4\]/\[2, 4\]/\[2, 4\], as joined \[6, 4\]"),
        ("t", torch.zeros(6), r"t is \[6\], as turned \[3, 2\]"),
        ("t", torch.zeros(3, 2), r"t is \[3, 2\], as turned \[3, 2\]"),
    ],
)
def test_a_part_of_another_shape_is_named(name, tensor, said):
    with pytest.raises(CheckpointError, match=said):
        take(THEIRS | {name: tensor})


def test_many_names_are_counted_and_the_first_shown():
    many = {f"n{number:02}": torch.zeros(1) for number in range(40)}
    with pytest.raises(CheckpointError, match=r"40 unexpected \(n00; n01; n02, \.\.\.\)"):
        take(THEIRS | many)
