"""Train the tiny multiway model on data/emoji with and without masked modelling, in equal time.

The contrast alone, with masked words (CMLM), with hidden patches (CMIM), and with both. A short
run and a shorter one of each tell its processor time a step, from which follow the steps that fit
the budget. One JSON object goes to stdout, a Markdown table to stderr.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emoji_loss import score
from setting import ROOT, describe_setting, leave

CONFIG = "configs/train/emoji-m2.yaml"
SHORT, SHORTER = 40, 10
SCORES = ("test_style", "test_novel_style")


def variants(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the flags of each variant."""
    words = f"--objectives.masked.cmlm_weight={options.cmlm_weight}"
    patches = f"--objectives.masked.cmim_weight={options.cmim_weight}"
    return {
        "ITC": [],
        "ITC + CMLM": [words],
        "ITC + CMIM": [patches],
        "ITC + CMLM + CMIM": [words, patches],
    }


def train(flags: Sequence[str], folder: Path, *, steps: int, seed: int) -> float:
    """Train once; return the processor seconds of the run and its loader."""
    settings = [
        "--config", CONFIG, f"--run_folder={folder}", f"--seed={seed}",
        "--evaluation.every_steps=0", "--checkpoint.every_steps=0",
        f"--schedule.steps={steps}", f"--schedule.warmup_steps={steps // 10}",
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.run(
        [sys.executable, "-m", "vlm", "train", *settings, *flags], cwd=ROOT, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if child.returncode:
        raise SystemExit(f"training ended with {child.returncode}:\n{child.stdout[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def step_seconds(flags: Sequence[str], folder: Path, *, seed: int) -> float:
    """Return the processor seconds of a step, from the difference of two short runs."""
    times = [
        train(flags, folder.with_name(f"{folder.name}-{steps}"), steps=steps, seed=seed)
        for steps in (SHORT, SHORTER)
    ]
    return (times[0] - times[1]) / (SHORT - SHORTER)


def last_parts(folder: Path) -> dict[str, float]:
    """Return the parts of the loss in a run's last record."""
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in last.items() if key.startswith("loss/")}


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with a column a variant."""
    from vlm.markdown import markdown_table

    rows = [
        ["processor seconds a step", *(f"{run['seconds_a_step']:.2f}" for run in runs.values())],
        ["steps", *(str(run["steps"]) for run in runs.values())],
        ["processor seconds", *(f"{run['seconds']:.0f}" for run in runs.values())],
    ]
    for name in SCORES:
        for language in ("en", "zh"):
            for direction in ("text_to_image", "image_to_text"):
                key = f"{name}/{language}/{direction}/recall@"
                cells = [
                    " / ".join(f"{run['scores'][f'{key}{k}']:.3f}" for k in (1, 10))
                    for run in runs.values()
                ]
                rows.append([f"{key}1 / 10", *cells])
            key = f"{name}/{language}/mean_recall"
            rows.append([key, *(f"{run['scores'][key]:.3f}" for run in runs.values())])
    return markdown_table(["", *runs], rows)


def main() -> None:
    """Measure a step of each variant, train each for as long, score, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=360, help="processor seconds of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cmlm_weight", type=float, default=0.2)
    parser.add_argument("--cmim_weight", type=float, default=0.2)
    parser.add_argument(
        "--itc_steps", type=int, nargs="+", default=[],
        help="only the contrast, for so many steps each: what the same steps without more reach",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    setting = describe_setting("benchmarks/emoji_objectives.py", threads=1)
    runs: dict[str, dict[str, Any]] = {}
    asked: dict[str, tuple[list[str], int | None]] = {
        name: (flags, None) for name, flags in variants(options).items()
    }
    if options.itc_steps:
        asked = {f"ITC, {steps} steps": ([], steps) for steps in options.itc_steps}
    with tempfile.TemporaryDirectory(prefix="emoji_objectives_") as folder:
        for number, (name, (flags, fixed)) in enumerate(asked.items()):
            a_step = step_seconds(flags, Path(folder, f"short-{number}"), seed=options.seed)
            steps = fixed or round(options.seconds / a_step)
            run_folder = Path(folder, f"run-{number}")
            seconds = train(flags, run_folder, steps=steps, seed=options.seed)
            measured = {"seconds_a_step": a_step, "steps": steps, "seconds": seconds}
            runs[name] = measured | {"last_parts": last_parts(run_folder)} | score(run_folder)
            print(f"trained {name}: {steps} steps in {seconds:.0f} s", file=sys.stderr)
    leave(setting | {"runs": runs}, table(runs), options.out)


if __name__ == "__main__":
    main()
