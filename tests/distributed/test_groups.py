import pytest

from tests.support.processes import run_in_processes
from vlm.distributed.groups import SINGLE, split_into_groups
from vlm.errors import DistributedError


def test_one_process_is_a_group_of_its_own():
    assert split_into_groups() == SINGLE


def test_a_group_larger_than_the_world_names_both_sizes():
    with pytest.raises(DistributedError, match=r"group_size is 2.*world size, 1"):
        split_into_groups(2)


def _place(rank, group_size):
    group = split_into_groups(group_size)
    return [group.rank, group.size]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("group_size", "expected"),
    [
        (1, [[0, 1]] * 4),
        (2, [[0, 2], [1, 2], [0, 2], [1, 2]]),
        (4, [[0, 4], [1, 4], [2, 4], [3, 4]]),
        (None, [[0, 4], [1, 4], [2, 4], [3, 4]]),
    ],
)
def test_neighbouring_ranks_form_a_group(group_size, expected):
    assert run_in_processes(_place, 4, group_size) == expected


def _error_of(rank, group_size):
    try:
        split_into_groups(group_size)
    except DistributedError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("group_size", [0, 2])
def test_every_rank_refuses_a_size_that_does_not_divide_the_world(group_size):
    expected = f"group_size is {group_size}; expected a divisor of the world size, 3"
    assert run_in_processes(_error_of, 3, group_size) == [expected] * 3
