"""Where and with what a run was started: `env.json`, a record for each start."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil
import torch

from vlm import __version__
from vlm.files import write_file

ENVIRONMENT_NAME = "env.json"

_VARIABLES = (
    "ACCELERATE_",
    "CUDA_",
    "FSDP_",
    "GLOO_",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "TORCH",
)
"""Beginnings of the variables that decide how a run computes; others may hold secrets."""


def record_environment(folder: Path, *, step: int, processes: int) -> None:
    """Add a record of this start to a run's folder.

    Args:
        folder: Of the run.
        step: Steps that the run had taken before.
        processes: How many ranks take part.
    """
    path = folder / ENVIRONMENT_NAME
    try:
        records = list(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        records = []  # a record that nothing depends on stops no run
    records.append({"step": step, "processes": processes} | environment())
    content = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
    write_file(path, content.encode(errors="replace"))


def environment() -> dict[str, Any]:
    """Return versions, command, machine and devices, as JSON holds them."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": str(Path.cwd()),
        "vlm": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": _packages(),
        "host": platform.node(),
        "system": platform.platform(),
        "processor": f"{os.cpu_count()} x {_processor()}",
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": _devices(),
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
    }


def _packages() -> dict[str, str]:
    """Return the versions of what vlm needs and may use, where it is installed."""
    found = {}
    try:
        needed = requires("vlm") or []
    except PackageNotFoundError:
        needed = ["torch", "accelerate"]
    for requirement in needed:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return dict(sorted(found.items()))


def _commit() -> str | None:
    """Return the commit of the checkout that runs, `+` after it where files differ from it."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(package), *words], capture_output=True, text=True, check=True,
            timeout=10,
        ).stdout.strip()  # fmt: skip

    try:
        # Fails in an installed package, also where another project's checkout is around it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "."))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    with suppress(OSError):
        information = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if model := re.search(r"^model name\s*: (.*)$", information, re.MULTILINE):
            return model[1]
    return platform.processor() or platform.machine()


def _devices() -> list[dict[str, Any]]:
    return [
        {"name": each.name, "memory_gib": round(each.total_memory / 2**30, 1)}
        for each in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
