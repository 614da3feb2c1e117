"""Real processes with real collectives (gloo on the CPU), for tests."""

import atexit
import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

PROCESSES = multiprocessing.get_context("forkserver")
"""Starts real processes that have imported already what costs seconds: each is a fork of one."""
PROCESSES.set_forkserver_preload(
    ["torch", "open_clip", "accelerate", "faiss", "matplotlib.pyplot", "pyarrow.parquet",
     "vlm.quickstart", "vlm.training.build", "vlm.checkpoints.conversion",
     "torch.utils.tensorboard"]
)  # fmt: skip


SECONDS = 120.0
"""After which a function is taken to hang."""
MOST_WORLDS = 2
"""That stay at a time; a process that waits still needs memory."""


def run_in_processes(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Run `function(rank, *arguments)` on each rank of a new world; return what each returned.

    `function` must be at module level. An exception on any rank is raised here with its text.
    """
    with closing(_World(world_size)) as world:
        return world.run(function, arguments)


def run_in_world(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Do the same in a world that stays for the next call, for functions that leave nothing."""
    world = _worlds.pop(world_size, None) or _World(world_size)
    try:
        found = world.run(function, arguments)
    except BaseException:
        world.close()
        raise
    _worlds[world_size] = world
    if len(_worlds) > MOST_WORLDS:
        _worlds.pop(next(iter(_worlds))).close()  # the one that has not been used for longest
    return found


def as_launched(rank: int, world_size: int) -> None:
    """Let a function that runs in a world build a run, which asks what a launcher has said."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    numbers["LOCAL_WORLD_SIZE"] = world_size
    os.environ.update({name: str(number) for name, number in numbers.items()})


class _World:
    """Processes in one process group, which run one function after another."""

    def __init__(self, size: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.workers, self.ends = [], []
        for rank in range(size):
            own, theirs = PROCESSES.Pipe()
            worker = PROCESSES.Process(target=_serve, args=(theirs, rank, size, self.folder.name))
            worker.start()
            theirs.close()  # so that the end of this process ends the worker
            self.workers.append(worker)
            self.ends.append(own)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        for end in self.ends:
            end.send((function, arguments))
        replies: dict[Connection, str] = {}
        deadline = monotonic() + SECONDS
        while len(replies) < len(self.ends) and monotonic() < deadline:
            for end in wait([e for e in self.ends if e not in replies], deadline - monotonic()):
                assert isinstance(end, Connection)
                try:
                    replies[end] = end.recv()
                except EOFError:
                    replies[end] = "the process ended"
        texts = [f"{rank}: {replies.get(end, 'hung')}" for rank, end in enumerate(self.ends)]
        if any(replies.get(end, "hung") for end in self.ends):
            raise RuntimeError("\n".join(texts))
        return [
            torch.load(Path(self.folder.name) / f"{rank}.result", weights_only=True)
            for rank in range(len(self.ends))
        ]

    def close(self) -> None:
        for end in self.ends:
            end.close()
        for worker in self.workers:
            worker.join(timeout=10)
            worker.kill()
            worker.join()
        self.folder.cleanup()


_worlds: dict[int, _World] = {}


@atexit.register
def _close_worlds() -> None:
    for world in _worlds.values():
        world.close()


def _serve(calls: Connection, rank: int, world_size: int, folder: str) -> None:
    gc.freeze()  # what was imported before the fork is no garbage
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        while True:
            function, arguments = calls.recv()
            torch.manual_seed(0)
            torch.save(function(rank, *arguments), Path(folder) / f"{rank}.result")
            dist.barrier()  # a rank that leaves early breaks the connections others still make
            calls.send("")
    except EOFError:
        pass  # no more calls
    except Exception as error:
        calls.send(f"{type(error).__name__}: {error}")
    finally:
        dist.destroy_process_group()
