"""Train the quickstart's model with its ways to use a second core, alone and beside a busy process.

One JSON object goes to stdout, a Markdown table to stderr; `benchmarks/README.md` says what is
counted. Settings and situations take turns, each run a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from setting import ROOT, describe_setting, leave

CONFIG = "configs/train/emoji.yaml"
OTHER = "another checkout"  # with --beside, as its own configuration file says
SETTINGS = {
    "one thread": ["--cpu_threads=1", "--parallel_towers=false"],
    "two threads": ["--cpu_threads=2", "--parallel_towers=false"],
    "parallel towers": ["--cpu_threads=1", "--parallel_towers=true"],
}
SITUATIONS = ("alone", "beside a busy process")
FIRST_STEP = 60
"""What comes before is not counted: in the first epoch every image is decoded."""


@contextmanager
def busy_process() -> Iterator[None]:
    """Keep one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def train(checkout: Path, flags: Sequence[str], situation: str, steps: int) -> dict[str, float]:
    """Run `vlm train` of a checkout; return the rates of its steps, and the last loss."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OMP_NUM_THREADS", None)
    with tempfile.TemporaryDirectory(prefix="cores_") as folder:
        command = [
            sys.executable, "-m", "vlm", "train", "--config", CONFIG, "--report_every=20",
            f"--run_folder={folder}/run", f"--schedule.steps={steps}", "--schedule.warmup_steps=10",
            "--evaluation.every_steps=0", "--checkpoint.every_steps=0", *flags,
        ]  # fmt: skip
        with nullcontext() if situation == SITUATIONS[0] else busy_process():
            child = subprocess.run(
                command, check=False, cwd=checkout, env=environment, capture_output=True
            )
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{child.stderr.decode()[-2000:]}")
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["step"] > FIRST_STEP]
    return {
        # Each record is of as many steps, so that their times are added.
        "samples_per_s": statistics.harmonic_mean([each["samples_per_s"] for each in records]),
        "data_wait_ratio": statistics.mean(each["data_wait_ratio"] for each in records),
        "loss": records[-1]["loss"],
    }


def table(runs: dict[str, dict[str, list[dict[str, float]]]], first: str) -> str:
    """Return medians and extremes, and ratios of neighbouring runs to the first setting's."""
    from vlm.markdown import markdown_table

    def cell(values: Sequence[float], digits: int) -> str:
        low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
        return f"{statistics.median(values):,.{digits}f} ({low} to {high})"

    rows = []
    for situation, by_setting in runs.items():
        base = [each["samples_per_s"] for each in by_setting[first]]
        for setting, of in by_setting.items():
            rates = [each["samples_per_s"] for each in of]
            ratios = [own / other for own, other in zip(rates, base, strict=True)]
            waits = [each["data_wait_ratio"] for each in of]
            rows.append([situation, setting, cell(rates, 0), cell(ratios, 2), cell(waits, 3)])
    header = ["situation", "setting", "samples/s", f"/ {first}", "ratio of time that data is late"]
    return markdown_table(header, rows)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=140, help=f"of a run, more than {FIRST_STEP}")
    parser.add_argument(
        "--beside", type=Path, metavar="PATH", help="also train with the vlm of this other checkout"
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    if options.steps <= FIRST_STEP:
        parser.error(f"--steps is {options.steps}; expected more than {FIRST_STEP}")
    systems = {name: (ROOT, SETTINGS[name]) for name in options.settings}
    result: dict[str, Any] = describe_setting("benchmarks/cores.py", threads=1)
    if options.beside:
        systems = {OTHER: (options.beside.resolve(), []), **systems}
        commit = ["git", "rev-parse", "HEAD"]
        result["beside"] = subprocess.check_output(commit, cwd=options.beside, text=True).strip()
    runs: dict[str, dict[str, list[dict[str, float]]]] = {
        situation: {name: [] for name in systems} for situation in SITUATIONS
    }
    for _ in range(options.rounds):
        for situation, by_setting in runs.items():
            for name, (checkout, flags) in systems.items():
                by_setting[name].append(train(checkout, flags, situation, options.steps))
    leave(
        result | {"runs": runs, "load_after": os.getloadavg()[0]},
        table(runs, next(iter(systems))),
        options.out,
    )


if __name__ == "__main__":
    main()
