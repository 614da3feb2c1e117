"""Real processes with real collectives (gloo on the CPU), for tests."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PROCESSES = multiprocessing.get_context("forkserver")
"""Starts real processes that have imported already what costs seconds: each is a fork of one."""
PROCESSES.set_forkserver_preload(
    ["torch", "open_clip", "accelerate", "faiss", "matplotlib.pyplot", "pyarrow.parquet",
     "vlm.quickstart", "vlm.training.step", "vlm.checkpoints.conversion"]
)  # fmt: skip


def run_in_processes(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Run `function(rank, *arguments)` on each rank of a new world; return what each returned.

    `function` must be at module level. An exception on any rank is raised here with its text.
    """
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            PROCESSES.Process(target=_run, args=(function, rank, world_size, folder, arguments))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=120)
        hung = [worker for worker in workers if worker.is_alive()]
        for worker in hung:
            worker.kill()
        errors = sorted(Path(folder).glob("*.error"))
        if errors or hung or any(worker.exitcode for worker in workers):
            texts = [f"{path.stem}: {path.read_text()}" for path in errors]
            codes = [worker.exitcode for worker in workers]
            raise RuntimeError(f"exit codes {codes}, {len(hung)} hung\n" + "\n".join(texts))
        return [
            torch.load(Path(folder) / f"{rank}.result", weights_only=True)
            for rank in range(world_size)
        ]


def _run(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, arguments: tuple[Any]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"{rank}.result")
        dist.barrier()  # a rank that leaves early breaks the connections others still make
    except Exception as error:
        (Path(folder) / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
    finally:
        dist.destroy_process_group()
