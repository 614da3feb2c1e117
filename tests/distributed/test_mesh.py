import pytest

from tests.support.processes import run_in_world
from vlm.distributed import mesh
from vlm.distributed.groups import RankGroup
from vlm.distributed.mesh import build_mesh, mesh_shape, near_ranks
from vlm.errors import DistributedError


@pytest.mark.parametrize(
    ("shape", "members", "ranks_per_node", "expected"),
    [
        ("auto", range(1), 1, (1, 1)),
        ("auto", range(8), 8, (2, 4)),
        ("auto", range(16), 16, (4, 4)),
        ("auto", range(7), 8, (1, 7)),
        ("auto", range(16), 8, (2, 8)),  # images stay inside a node
        ("auto", range(64), 8, (8, 8)),
        ("auto", range(0, 64, 8), 8, (2, 4)),  # one rank of each node
        ("auto", range(0, 16, 2), 8, (2, 4)),
        ("auto", range(4, 12), 8, (2, 4)),
        ("auto", range(12), 8, (3, 4)),  # nodes that the group fills unevenly
        ("text", range(6), 8, (6, 1)),
        ("image", range(6), 8, (1, 6)),
        ((3, 2), range(6), 8, (3, 2)),
    ],
)
def test_the_mesh_of_a_group(shape, members, ranks_per_node, expected):
    assert mesh_shape(shape, members, ranks_per_node) == expected


@pytest.mark.parametrize("shape", [(2, 2), (6, 0), (-2, -3)])
def test_a_mesh_that_does_not_hold_the_group_is_refused(shape):
    message = rf"mesh is {shape[0]} x {shape[1]}; expected rows times columns to be .*, 6"
    with pytest.raises(DistributedError, match=message):
        mesh_shape(shape, range(6), 8)


def _places(rank, *plan):
    mesh = build_mesh(*plan)
    return {
        "members": list(mesh.members),
        "row": [mesh.members[k] for k in mesh.row_members],
        "column": [mesh.members[k] for k in mesh.column_members],
        "place": [mesh.column.rank, mesh.row.rank],
        "rank": mesh.members[mesh.member],
    }


@pytest.mark.distributed
def test_rows_and_columns_of_contiguous_and_strided_groups():
    places = run_in_world(_places, 6, 6, (2, 3))
    assert places[4] == {
        "members": [0, 1, 2, 3, 4, 5], "row": [3, 4, 5], "column": [1, 4], "place": [1, 1],
        "rank": 4,
    }  # fmt: skip
    places = run_in_world(_places, 4, 2, (2, 1), "strided")
    assert places[3] == {
        "members": [1, 3], "row": [3], "column": [1, 3], "place": [1, 0], "rank": 3,
    }  # fmt: skip


def _error(rank, *plan):
    try:
        build_mesh(*plan)
    except DistributedError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((0,), "group_size is 0; expected a divisor of the world size, 3"),
        ((2,), "group_size is 2; expected a divisor of the world size, 3"),
        ((3, (2, 2)), "the mesh is 2 x 2; expected rows times columns to be the group size, 3"),
    ],
)
def test_every_rank_refuses_a_plan_that_does_not_fit_the_world(plan, message):
    assert run_in_world(_error, 3, *plan) == [message] * 3


def test_ranks_that_share_a_copy_of_the_weights_are_near_each_other(monkeypatch):
    monkeypatch.setattr(mesh, "world_group", lambda: RankGroup(None, rank=0, size=8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert near_ranks() == 8
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert near_ranks() == 8
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "4")
    assert near_ranks() == 2
    assert mesh_shape("auto", range(8), near_ranks()) == (4, 2)
