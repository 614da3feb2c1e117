"""Groups of ranks that exchange data."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from vlm.errors import DistributedError


@dataclass(frozen=True, slots=True)
class RankGroup:
    """A group of ranks as one of its members sees it."""

    process_group: dist.ProcessGroup | None
    """The communicator; None where the group is this process alone."""
    rank: int
    """This process's place in the group, in [0, size)."""
    size: int


SINGLE = RankGroup(process_group=None, rank=0, size=1)

T = TypeVar("T")

_Partition = tuple[tuple[int, ...], ...]

# By the world they divide. A communicator holds connections and, on GPUs, memory: parts of a
# program that divide the ranks in the same way share theirs.
_joined: WeakKeyDictionary[dist.ProcessGroup, dict[_Partition, RankGroup]] = WeakKeyDictionary()


def world_group() -> RankGroup:
    """Return the group of all ranks; this process alone where there is no process group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE
    return RankGroup(dist.group.WORLD, rank=dist.get_rank(), size=dist.get_world_size())


def join_group(partition: Sequence[Sequence[int]]) -> RankGroup:
    """Divide the ranks into groups and return this process's own.

    Making a communicator is a collective operation: every rank must call this at the same point
    with the same partition, in which each rank occurs once.

    Args:
        partition: The ranks of each group, in the order of their places.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    members = next(group for group in partition if rank in group)
    if len(members) == 1:
        return SINGLE
    if list(members) == list(range(dist.get_world_size())):
        return world_group()  # in the world's own order its communicator does
    assert dist.group.WORLD is not None
    known = _joined.setdefault(dist.group.WORLD, {})
    key = tuple(tuple(group) for group in partition)
    if key not in known:
        # Collective: every rank makes every group, also those of others, in the same order.
        for group in key:
            made = dist.new_group(list(group))
            # Ranks that are not members get a placeholder, which is no ProcessGroup.
            if group == tuple(members) and isinstance(made, dist.ProcessGroup):
                known[key] = RankGroup(made, rank=group.index(rank), size=len(group))
    return known[key]


def host_group(patience: timedelta) -> RankGroup:
    """Return a new group of all ranks for messages between their hosts.

    It is apart from those of training: a thread may use it while a step's collectives run. Every
    rank must call this at the same point.

    Args:
        patience: How long a rank waits for the others.
    """
    world = world_group()
    if world.size == 1:
        return SINGLE
    made = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(made, dist.ProcessGroup)
    return RankGroup(made, rank=world.rank, size=world.size)


def exchange(mine: T, group: RankGroup) -> list[T]:
    """Return what every rank of a group of hosts brings, in the order of ranks.

    For small things that are no tensors: they travel pickled, between processes of one run.
    """
    if group.size == 1:
        return [mine]
    found: list[T | None] = [None] * group.size
    dist.all_gather_object(found, mine, group=group.process_group)
    return [each for each in found if each is not None]


@contextmanager
def launched_group(device: str | None = None) -> Iterator[RankGroup]:
    """Join the ranks that `accelerate launch` or torchrun started, and leave them at the end.

    Without a launcher the group is this process alone. With one, every rank enters this, once;
    from then on its current GPU is its own, so that models which are loaded to `cuda`, or to no
    device in particular, go there. Ranks wait for each other at the end, but not after an error.

    Args:
        device: The device that models will be loaded to; in a group of several ranks `cpu`, or
            None for each rank's own.

    Raises:
        DistributedError: another device was asked for, and there are several ranks.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))  # set by the launcher, before any group exists
    if ranks == 1:
        yield SINGLE
        return
    if device not in (None, "cpu"):
        raise DistributedError(
            f"the device is {device} and there are {ranks} ranks; expected cpu, or none, for a "
            "device of its own for each rank"
        )
    from accelerate import PartialState  # seconds of imports that one process alone can do without

    # Unless it is asked for the CPU, accelerate makes no group of processes without a GPU.
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield world_group()
        # A rank that leaves early breaks the connections that others still use.
        state.wait_for_everyone()
    finally:
        state.destroy_process_group()
