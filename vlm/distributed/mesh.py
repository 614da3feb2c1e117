"""The mesh of ranks on which a loss group compares images with texts."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from vlm.distributed.config import Grouping, MeshShape
from vlm.distributed.groups import RankGroup, join_group, world_group
from vlm.distributed.sharding import launched_sharding
from vlm.errors import DistributedError


@dataclass(frozen=True, slots=True)
class RankMesh:
    """A loss group's ranks in `rows` x `columns`, as the rank at (p, q) sees them.

    This rank compares the images of mesh row p with the texts of mesh column q: images
    travel along rows, texts along columns. A group's members are numbered row by row.
    """

    row: RankGroup
    """The ranks of mesh row p, one a column."""
    column: RankGroup
    """The ranks of mesh column q, one a row."""
    group: RankGroup
    world: RankGroup
    members: tuple[int, ...]
    """The world's ranks in this loss group, row by row."""

    @property
    def rows(self) -> int:
        """Number of mesh rows."""
        return self.column.size  # a column has one rank from each row

    @property
    def columns(self) -> int:
        """Number of mesh columns."""
        return self.row.size

    @property
    def row_members(self) -> range:
        """Members of this rank's mesh row, by their number in the group."""
        return range(self.column.rank * self.columns, (self.column.rank + 1) * self.columns)

    @property
    def column_members(self) -> range:
        """Members of this rank's mesh column, by their number in the group."""
        return range(self.row.rank, self.rows * self.columns, self.columns)

    @property
    def member(self) -> int:
        """This rank's number in the group."""
        return self.column.rank * self.columns + self.row.rank


def build_mesh(
    group_size: int | None = None, shape: MeshShape = "auto", grouping: Grouping = "contiguous"
) -> RankMesh:
    """Divide the world into loss groups and put each on a mesh; every rank must call this.

    Args:
        group_size: Ranks that contrast with each other; None is all of them.
        shape: (rows, columns), or a rule as `mesh_shape` explains.
        grouping: `contiguous` groups neighbouring ranks; `strided` takes every n-th rank.

    Raises:
        DistributedError: the group size does not divide the world size, or the mesh does not
            hold the group (on every rank alike).
    """
    world = world_group()
    groups = loss_groups(world.size, group_size, grouping)
    rows, columns = mesh_shape(shape, groups[0], near_ranks())
    # Ranks are numbered row by row: rank (p, q) of a group is its member p * columns + q.
    mesh_rows = [g[p * columns : (p + 1) * columns] for g in groups for p in range(rows)]
    mesh_columns = [g[q::columns] for g in groups for q in range(columns)]
    # Collective, three times: all ranks make the rows' communicators, then the columns', then
    # the groups'.
    return RankMesh(
        row=join_group(mesh_rows),
        column=join_group(mesh_columns),
        group=join_group(groups),
        world=world,
        members=next(g for g in groups if world.rank in g),
    )


def loss_groups(
    world_size: int, group_size: int | None = None, grouping: Grouping = "contiguous"
) -> list[tuple[int, ...]]:
    """Return the ranks of each loss group, as `build_mesh` explains.

    Raises:
        DistributedError: the group size does not divide the world size.
    """
    size = world_size if group_size is None else group_size
    if size < 1 or world_size % size:
        raise DistributedError(
            f"group_size is {size}; expected a divisor of the world size, {world_size}"
        )
    return [
        tuple(range(k, world_size, world_size // size))
        if grouping == "strided"
        else tuple(range(k * size, (k + 1) * size))
        for k in range(world_size // size)
    ]


def mesh_shape(shape: MeshShape, members: Sequence[int], near_ranks: int) -> tuple[int, int]:
    """Return (rows, columns) for one loss group.

    `text` is (g, 1), where only texts travel, and `image` is (1, g). `auto` makes a mesh row of
    `near_ranks` neighbours where a group spans several such neighbourhoods evenly, so that images
    stay inside them; else it takes the squarest mesh, which sends least, with no more rows than
    columns.

    Raises:
        DistributedError: rows times columns is not the group's size.
    """
    size = len(members)
    if isinstance(shape, tuple):
        if min(shape) < 1 or shape[0] * shape[1] != size:
            raise DistributedError(
                f"the mesh is {shape[0]} x {shape[1]}; expected rows times columns to be the "
                f"group size, {size}"
            )
        return shape
    if shape == "text":
        return size, 1
    if shape == "image":
        return 1, size
    # Neighbourhood k has ranks k * near_ranks and so on.
    near = Counter(member // near_ranks for member in members)
    columns = min(near.values())
    if len(near) > 1 and columns > 1 and columns == max(near.values()):
        return size // columns, columns
    # The largest divisor up to the square root: what travels grows with rows + columns.
    rows = max(k for k in range(1, int(size**0.5) + 1) if size % k == 0)
    return rows, size // rows


def near_ranks() -> int:
    """Return how many neighbouring ranks exchange quickly.

    They are those that share one copy of the weights where there are several copies, since who
    divides weights so knows where links are quick; else those of a machine.
    """
    sharding = launched_sharding(world_group().size)
    return ranks_per_node() if sharding is None or sharding.copies == 1 else sharding.ranks


def ranks_per_node() -> int:
    """Return how many ranks a machine runs, from torchrun's variable; else the world's size."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))
