"""What ends a run, in words: which rank, at which step, and where it goes on."""

import re
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from vlm.errors import DataError, DistributedError, VlmError

_ANSWER_S = 5.0
"""Seconds that a rank may take to say that it is still there: all fail at about the same time."""

_OF_A_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? (.*?)\) (.*?)\.?\s*(?:It is|$)", re.S)


def named(error: Exception, *, step: int, saved: Path | None) -> Exception:
    """Return an error that says what has ended a run, at which step, and where it goes on.

    One that nobody knows, which is a fault of the program, is returned as it is.

    Args:
        error: What training has raised.
        step: Steps taken before it.
        saved: The newest checkpoint.
    """
    rest = going_on(saved)
    if isinstance(error, VlmError):
        return type(error)(f"{error} (after step {step}; {rest})")
    if found := _OF_A_WORKER.match(str(error)):
        pid, end = found.groups()
        return DataError(
            f"a data worker (process {pid}) has ended after step {step}: {end}; it may have run "
            f"out of memory; {rest}"
        )
    if dist.is_initialized() and _is_of_a_collective(error):
        silent = ranks_that_do_not_answer()
        who = " and ".join(f"rank {rank}" for rank in silent) or "another rank"
        return DistributedError(
            f"{who} no longer answers after step {step}, as rank {dist.get_rank()} has found; its "
            f"own last lines say why, if it had time for them; {rest}"
        )
    return error


def going_on(saved: Path | None) -> str:
    """Say what a run has left to go on from."""
    return f"--resume goes on from {saved}" if saved else "nothing is saved yet"


def _is_of_a_collective(error: Exception) -> bool:
    """Say whether other ranks were waited for in vain: gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def ranks_that_do_not_answer() -> list[int]:
    """Ask all ranks for a sign of life, through the store at which they met.

    A rank whose collective has failed asks as well, which is its answer.
    """
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    silent = []
    try:
        store.set(f"alive/{rank}", "")
        for other in range(dist.get_world_size()):
            try:
                store.wait([f"alive/{other}"], timedelta(seconds=_ANSWER_S))
            except dist.DistStoreError:  # it took too long
                silent.append(other)
    except RuntimeError:  # the store has gone with the rank that kept it
        return [0]
    return silent
