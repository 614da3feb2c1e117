"""Run the project's commands as a user does, in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
    """Run a command to its end; return what it printed to stdout and stderr."""
    process = start_vlm(*arguments, launcher=launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err[-3000:]}"
    return out, err
