"""Run the project's commands as a user does, in processes of their own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.support.processes import PROCESSES

ROOT = Path(__file__).parents[2]
"""The checkout; its `data`, `tokenizers` and `configs` are found from here."""


TINY_QUICKSTART = (
    "--schedule.steps", "6", "--schedule.warmup_steps", "2", "--evaluation.every_steps", "3",
    "--data.batch_size", "32", "--data.workers", "0", "--report_every", "2",
)  # fmt: skip
"""Options that make the quickstart a matter of seconds."""


def start_vlm(*arguments: str | Path, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start `python -m vlm ARGUMENTS` in the checkout, under a launcher module if one is given."""
    modules = [*launcher, "-m", "vlm"] if launcher else ["vlm"]
    return subprocess.Popen(
        [sys.executable, "-m", *modules, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_vlm(*arguments: str | Path, launcher: Sequence[str] = (), code: int = 0) -> tuple[str, str]:
    """Run a command to its end; return what it printed to stdout and stderr.

    Without a launcher its process is a fork of one that has imported the libraries already.
    """
    if launcher:
        process = start_vlm(*arguments, launcher=launcher)
        out, err = process.communicate(timeout=300)
        found = process.returncode
    else:
        with tempfile.TemporaryDirectory() as folder:
            printed = Path(folder, "out"), Path(folder, "err")
            child = PROCESSES.Process(
                target=_run_main, args=(list(map(str, arguments)), *map(str, printed))
            )
            child.start()
            child.join(timeout=300)
            found = child.exitcode
            out, err = (path.read_text(encoding="utf-8") for path in printed)
            if found is None:
                child.kill()
    assert found == code, f"exit code {found}\n{out}\n{err[-3000:]}"
    return out, err


def _run_main(arguments: list[str], out: str, err: str) -> None:
    """Be the command, in a process of its own."""
    for name, number in ((out, 1), (err, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    sys.argv = ["vlm", *arguments]
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does
    from vlm.cli.main import main

    sys.exit(main(arguments))
