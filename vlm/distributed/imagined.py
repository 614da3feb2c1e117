"""A world of ranks that are not there, for plans: what they would send goes nowhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from vlm.errors import DistributedError


@contextmanager
def imagined_world(ranks: int) -> Iterator[None]:
    """Make this process rank 0 of that many ranks, within a `with` block.

    Collectives return at once and leave their results as they are: only shapes mean anything.

    Raises:
        DistributedError: this process has met other ranks already.
    """
    if dist.is_initialized():
        raise DistributedError(
            f"this process is one of {dist.get_world_size()} ranks already; expected one on its own"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
