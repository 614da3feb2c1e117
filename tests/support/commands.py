"""Run the project's commands as a user does, in processes of their own."""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.processes import PROCESSES

ROOT = Path(__file__).parents[2]
"""The checkout; its `data`, `tokenizers` and `configs` are found from here."""


TINY_QUICKSTART = (
    "--schedule.steps", "6", "--schedule.warmup_steps", "2", "--evaluation.every_steps", "3",
    "--data.batch_size", "32", "--data.workers", "0", "--report_every", "2",
)  # fmt: skip
"""Options that make the quickstart a matter of seconds."""


def start_vlm(
    *arguments: str | Path, launcher: Sequence[str] = (), folder: Path = ROOT
) -> subprocess.Popen[str]:
    """Start `python -m vlm ARGUMENTS` in `folder`, under a launcher module if one is given."""
    modules = [*launcher, "-m", "vlm"] if launcher else ["vlm"]
    return subprocess.Popen(
        [sys.executable, "-m", *modules, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_vlm(
    *arguments: str | Path,
    launcher: Sequence[str] = (),
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    code: int = 0,
) -> tuple[str, str]:
    """Run a command in `folder` to its end; return what it printed to stdout and stderr.

    Without a launcher its processes are forks of one that has imported the libraries already;
    several are ranks that meet as those which `torchrun` and `accelerate launch` start, and
    `environment` has what a launcher's file says besides.
    """
    if launcher:
        process = start_vlm(*arguments, launcher=launcher, folder=folder)
        out, err = process.communicate(timeout=300)
        found = process.returncode
    else:
        words = list(map(str, arguments))
        with tempfile.TemporaryDirectory() as printed:
            out_file, err_file = Path(printed, "out"), Path(printed, "err")
            ranks = [
                PROCESSES.Process(
                    target=run_main,
                    args=(words, folder, own | dict(environment or {}), out_file, err_file),
                )
                for own in environments(processes)
            ]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join(timeout=300)
            # A rank that fails has a code above 0, one that hangs has none.
            found = max((rank.exitcode for rank in ranks), key=lambda code: code != 0)
            for rank in ranks:
                rank.kill()
            out, err = (path.read_text(encoding="utf-8") for path in (out_file, err_file))
    assert found == code, f"exit code {found}\n{out}\n{err[-3000:]}"
    return out, err


def environments(processes: int) -> list[dict[str, str]]:
    """Return what tells each of several ranks on this machine where it stands."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
    }  # fmt: skip
    return [
        {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(processes)
    ]


def run_main(
    arguments: list[str],
    folder: Path,
    environment: dict[str, str],
    out: Path,
    err: Path,
    fault: Callable[[Any], Any] | None = None,
) -> None:
    """Be the command, in a process of its own, with a fault in the run that it builds."""
    gc.freeze()  # what was imported before the fork is no garbage
    for path, number in ((out, 1), (err, 2)):
        # Ranks write to the same files.
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["vlm", *arguments]
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
    multiprocessing.set_start_method("fork", force=True)  # as outside of a fork server
    from vlm.cli.main import main
    from vlm.training import build

    if fault is not None:
        plain = build.build_run
        build.build_run = lambda *args, **options: fault(plain(*args, **options))
    sys.exit(main(arguments))
