"""Which ranks contrast their batches with each other."""

from dataclasses import dataclass

import torch.distributed as dist

from vlm.errors import DistributedError


@dataclass(frozen=True, slots=True)
class RankGroup:
    """A group of ranks as one of its members sees it."""

    process_group: dist.ProcessGroup | None
    """The communicator; none where the group is this process alone."""
    rank: int
    """This process's place in the group, in [0, size)."""
    size: int
    """Number of ranks in the group."""


SINGLE = RankGroup(process_group=None, rank=0, size=1)


def split_into_groups(group_size: int | None = None) -> RankGroup:
    """Split the world into groups of neighbouring ranks and return this process's own.

    Every rank must call this at the same point: making a group is a collective operation.

    Args:
        group_size: Ranks in a group; it must divide the world size. None is the whole world.

    Raises:
        DistributedError: `group_size` does not divide the world size (on every rank).
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    size = world_size if group_size is None else group_size
    if size < 1 or world_size % size:
        raise DistributedError(
            f"group_size is {size}; expected a divisor of the world size, {world_size}"
        )
    if size == 1:
        return SINGLE
    rank = dist.get_rank()
    if size == world_size:
        return RankGroup(process_group=dist.group.WORLD, rank=rank, size=size)
    first = rank - rank % size
    own = None
    for start in range(0, world_size, size):  # every rank makes every group
        group = dist.new_group(list(range(start, start + size)))
        if start == first and isinstance(group, dist.ProcessGroup):
            own = group
    return RankGroup(process_group=own, rank=rank - first, size=size)
