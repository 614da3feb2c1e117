import pytest

from tests.support.processes import run_in_world
from vlm.distributed.groups import SINGLE, join_group, world_group


def test_one_process_is_a_group_of_its_own():
    assert world_group() == SINGLE
    assert join_group([[0]]) == SINGLE


def _place(rank, partition):
    group = join_group(partition)
    return [group.rank, group.size]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("partition", "expected"),
    [
        ([[0], [1], [2], [3]], [[0, 1]] * 4),
        ([[0, 1], [2, 3]], [[0, 2], [1, 2], [0, 2], [1, 2]]),
        ([[2, 0], [1, 3]], [[1, 2], [0, 2], [0, 2], [1, 2]]),
        ([[0, 1, 2, 3]], [[0, 4], [1, 4], [2, 4], [3, 4]]),
    ],
)
def test_each_rank_finds_its_place_in_its_group(partition, expected):
    assert run_in_world(_place, 4, partition) == expected


def _communicators(rank):
    first, again = join_group([[0, 1], [2, 3]]), join_group([[0, 1], [2, 3]])
    other = join_group([[0, 2], [1, 3]])
    whole = join_group([[0, 1, 2, 3]])
    return [
        first.process_group is again.process_group,
        first.process_group is other.process_group,
        whole.process_group is world_group().process_group,
    ]


@pytest.mark.distributed
def test_the_same_partition_shares_its_communicators_and_the_whole_world_needs_none():
    assert run_in_world(_communicators, 4) == [[True, False, True]] * 4
