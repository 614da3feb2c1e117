"""On what, with what and from which commit a result was measured."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def describe_setting(script: str, *, threads: int) -> dict[str, Any]:
    """Return the hardware, the versions and the commit; the load says how quiet it was."""
    commit, changes = (
        subprocess.check_output(["git", *words], cwd=ROOT, text=True).strip()
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    packages = ("torch", "open_clip_torch", "timm", "vlm")
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "commit": commit,
        "uncommitted_changes": bool(changes),
    }


def leave(result: Mapping[str, Any], table: str, out: Path | None) -> None:
    """Print a result as JSON to stdout, and its table to stderr; write the JSON to a file too."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    print(text)
    print(table, file=sys.stderr)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
