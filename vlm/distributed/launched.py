"""The ranks that a launcher started together with this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlm.distributed.groups import SINGLE, RankGroup, world_group
from vlm.errors import DistributedError


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
