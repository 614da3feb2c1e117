"""Teach an English model Chinese on data/emoji: what keeps its English, and at what price?

A model is trained on the English captions, grown to `tokenizers/clip-zh`, and trained on Chinese
captions: plainly, in stages, towards its frozen start, with old data replayed, and with all of
these. One JSON object goes to stdout, a Markdown table to stderr; `benchmarks/README.md` says what
is equal. With `--folder` a run goes on where it was interrupted.
"""

import argparse
import contextlib
import json
import re
import resource
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setting import describe_setting, leave
from vocabulary_growth import CONFIG, CONTEXT_LENGTH, CONTINUED, SPLITS, TOKENIZER, score, vlm

START = "English model"
BATCH = 128  # of CONTINUED
PLAIN, ALL = "plain", "stages, distillation, replay"


def flags_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return settings as options of `vlm train`."""
    return tuple(
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
    )


def courses(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings of each way to go on with the grown model, by name."""
    new, whole = options.new_rows_steps, options.continued
    stages = {
        "schedule.steps": new + whole,
        "stages": [
            {"steps": new, "trained": "new_rows", "warmup_steps": new // 10}
            | {"learning_rate": options.new_rows_rate},
            {"trained": "all"},
        ],
    }
    distillation = {
        f"objectives.distillation.{name}_weight": getattr(options, f"{name}_weight")
        for name in ("feature", "structure", "logit")
        if getattr(options, f"{name}_weight")
    }
    replay = {
        "data.batch_size": BATCH + options.replayed,
        "data.sources": [
            {"name": "new", "path": "data/emoji", "languages": ["zh"], "weight": BATCH},
            {"name": "old", "path": "data/emoji", "languages": ["en"], "weight": options.replayed},
        ],
        "captions.languages": ["zh", "en"],
    }
    # Where no English caption is read, only images have a teacher, and no image has a logit.
    images = {name: value for name, value in distillation.items() if "logit" not in name}
    return {
        PLAIN: {},
        "stages": stages,
        "stages, distillation": stages | images,
        "stages, replay": stages | replay,
        ALL: stages | distillation | replay,
    }


def trained(place: Path, words: Sequence[str]) -> dict[str, Any]:
    """Train a model unless that is done; return its scores and the CPU seconds that it took."""
    record = place / "scores.json"
    if not record.exists():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        vlm("train", *words, f"--run_folder={place / 'run'}", "--resume", "auto")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found = {"scores": score(place / "run" / "bundle"), "cpu_seconds": round(seconds, 1)}
        record.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(record.read_text(encoding="utf-8"))
    print(f"{place}: {found}", file=sys.stderr)
    return found


def run_seed(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train the English model of a seed and everything that follows; return all scores."""
    folder.mkdir(exist_ok=True)
    quiet = ("--evaluation.every_steps=0", "--checkpoint.every_steps=0", f"--seed={seed}")
    steps = options.steps
    budget = (f"--schedule.steps={steps}", f"--schedule.warmup_steps={steps // 10}")
    tokenizer = f"--tokenizer={folder.parent / 'clip'}"
    results = {START: trained(folder / "english", ("--config", CONFIG, *quiet, *budget, tokenizer))}
    grown = folder / "grown"
    if not grown.exists():
        vlm("grow", str(folder / "english" / "run" / "bundle"),
            "--tokenizer", str(folder.parent / "clip-zh"), "--init", "lexicon",
            "--out", str(grown))  # fmt: skip
    go_on = (
        "--config", CONTINUED, "--start_from", str(grown), *quiet,
        f"--schedule.steps={options.continued}",
        f"--schedule.warmup_steps={options.continued // 10}",
        f"--optimizer.learning_rate={options.rate}",
    )  # fmt: skip
    for name, settings in courses(options).items():
        if not options.only or name in options.only:
            place = folder / re.sub(r"\W+", "-", name)
            results[name] = trained(place, (*go_on, *flags_of(settings)))
    return results


def table(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a Markdown table of mean recalls, means over seeds with their extremes."""
    from vlm.markdown import markdown_table

    def cell(name: str, key: str) -> str:
        values = [run[name]["scores"][key] for run in runs if name in run]
        ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{ends}"

    def cost(name: str) -> str:
        if PLAIN not in runs[0] or name == START:
            return ""
        ratios = [run[name]["cpu_seconds"] / run[PLAIN]["cpu_seconds"] for run in runs]
        return f"{statistics.mean(ratios):.2f}"

    keys = [(split, language) for language in ("zh", "en") for split in SPLITS]
    header = ["course", *(f"{language} {split}" for split, language in keys), "CPU, of plain"]
    rows = [
        [name, *(cell(name, f"{split}/{language}") for split, language in keys), cost(name)]
        for name in runs[0]
    ]
    return markdown_table(header, rows)


def main() -> None:
    """Train, score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of the English model")
    parser.add_argument("--continued", type=int, default=150, help="steps on Chinese captions")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest, on Chinese captions")
    parser.add_argument("--new-rows-steps", type=int, default=15, help="before these")
    parser.add_argument("--new-rows-rate", type=float, default=3e-3)
    parser.add_argument("--replayed", type=int, default=32, help="old samples a step")
    parser.add_argument("--feature-weight", type=float, default=5.0)
    parser.add_argument("--structure-weight", type=float, default=0.0)
    parser.add_argument("--logit-weight", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, one a seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="of the courses, these alone")
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on with them")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    setting = describe_setting("benchmarks/keep_language.py", threads=1)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        context = ("--context_length", str(CONTEXT_LENGTH))
        for name, source in (("clip", "clip"), ("clip-zh", str(TOKENIZER))):
            if not (folder / name).exists():
                vlm("tokenizer", "import", source, *context, "--out", str(folder / name))
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        runs = [run_seed(folder / f"seed-{seed}", seed, options) for seed in seeds]
    leave(setting | {"runs": runs}, table(runs), options.out)


if __name__ == "__main__":
    main()
