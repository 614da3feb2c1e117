"""Train the emoji recipe with every optimizer, schedule, rate by tower and average, in equal time.

The time is that of a number of AdamW's steps. Short runs of variants in turn give the processor
time of a step in AdamW's, from which follow each one's steps. What is done is in `--out`, and is
not done again: the command may be stopped and given once more. One JSON object goes to stdout, a
Markdown table to stderr.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from emoji_training import run_child
from setting import ROOT, describe_setting

CONFIG = "configs/train/emoji.yaml"
SHORT, SHORTER = 130, 50  # steps; the first 40 or so decode the images
ROUNDS = 3  # of short runs
BASE = "AdamW"
SPLITS = ("test_style", "test_novel_style")
LANGUAGES = ("zh", "en")


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe, and which bundle of the run is scored."""

    flags: tuple[str, ...] = ()
    """Options of `vlm train`; `$most` stands for 70 % of the run's steps, `$few` for 4 %."""
    optimizer: str = "adamw"
    bundle: str = "bundle"
    costs: str | None = None
    """The variant whose step takes as long by construction; None where it is measured."""


LAST_CHECKPOINTS = (
    "--averaging.last_checkpoints=5", "--checkpoint.keep=5", "--checkpoint.every_steps=$few",
)  # fmt: skip
SMALL_FIRST = '--stages=[{"steps": $most, "image_size": 32}, {"goes_on": true}]'
VARIANTS = {
    BASE: Variant(),
    "AdamW, beta2 0.95": Variant(("--optimizer.betas=[0.9,0.95]",), costs=BASE),
    "AdamW, linear to 0": Variant(("--schedule.shape=linear",), costs=BASE),
    "AdamW, wsd": Variant(("--schedule.shape=wsd",), costs=BASE),
    "AdamW, image tower at 0.5": Variant(
        ("--optimizer.image.learning_rate_ratio=0.5",), costs=BASE
    ),
    "AdamW, text tower at 0.5": Variant(("--optimizer.text.learning_rate_ratio=0.5",), costs=BASE),
    "AdamW, layer decay 0.75": Variant(
        ("--optimizer.image.layer_decay=0.75", "--optimizer.text.layer_decay=0.75"), costs=BASE
    ),
    "Muon": Variant(optimizer="muon"),
    "Lion": Variant(
        ("--optimizer.learning_rate=6e-4", "--optimizer.weight_decay=1.5"), optimizer="lion"
    ),
    "AdamW, EMA": Variant(("--averaging.ema_decay=0.999",), "bundle-ema"),
    "AdamW, wsd, EMA": Variant(
        ("--schedule.shape=wsd", "--averaging.ema_decay=0.999"), "bundle-ema", "AdamW, EMA"
    ),
    "AdamW, last 5 checkpoints": Variant(LAST_CHECKPOINTS, "bundle-mean"),
    "AdamW, wsd, last 5 checkpoints": Variant(
        ("--schedule.shape=wsd", *LAST_CHECKPOINTS), "bundle-mean", "AdamW, last 5 checkpoints"
    ),
    "AdamW, 32 pixels, then 48": Variant((SMALL_FIRST,)),
    "Muon, 32 pixels, then 48": Variant((SMALL_FIRST,), optimizer="muon"),
    "Muon, EMA": Variant(("--averaging.ema_decay=0.999",), "bundle-ema", optimizer="muon"),
}


def train(variant: Variant, folder: Path, *, steps: int, seed: int) -> float:
    """Train once; return the processor seconds of the run and its loader."""
    settings = [
        "--config", CONFIG, f"--run_folder={folder}", f"--seed={seed}",
        "--evaluation.every_steps=0", "--checkpoint.every_steps=0",
        f"--optimizer.name={variant.optimizer}",
        f"--schedule.steps={steps}", f"--schedule.warmup_steps={steps * 140 // 1600}",
    ]  # fmt: skip
    lengths = {"most": steps * 7 // 10, "few": max(steps // 25, 1)}
    flags = [Template(flag).substitute(lengths) for flag in variant.flags]
    command = [sys.executable, "-m", "vlm", "train", *settings, *flags]
    return run_child(command, threads=1)["cpu_s"]


def step_seconds(variant: Variant, folder: Path) -> float:
    """Return the processor seconds of a step, from the difference of two short runs."""
    times = [
        train(variant, folder / f"{steps}-steps", steps=steps, seed=0) for steps in (SHORT, SHORTER)
    ]
    return (times[0] - times[1]) / (SHORT - SHORTER)


def relative_costs(names: Sequence[str]) -> dict[str, float]:
    """Return the processor time of a step in steps of `BASE`, of what variants cost as much as."""
    kinds = dict.fromkeys([BASE, *(VARIANTS[name].costs or name for name in names)])
    rounds = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="optimizers_") as temporary:
            rounds.append(
                {
                    kind: step_seconds(VARIANTS[kind], Path(temporary, str(number)))
                    for number, kind in enumerate(kinds)
                }
            )
    # Ratios within a round: how long a step takes depends on what else the machine does.
    return {kind: statistics.median(each[kind] / each[BASE] for each in rounds) for kind in kinds}


def score(embedder: Any) -> dict[str, float]:
    """Return the mean recall of each split and language, and of all."""
    from vlm.data.config import SourceConfig
    from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
    from vlm.evaluation.retrieval.pairs import pairs_of_split

    scores = {}
    for split in SPLITS:
        source = SourceConfig(path=str(ROOT / "data" / "emoji"), split=split)
        found = evaluate_retrieval(embedder, pairs_of_split(source, languages=LANGUAGES))
        of_split = {f"{split}/{each}": found[f"{each}/mean_recall"] for each in LANGUAGES}
        scores |= of_split | {split: statistics.mean(of_split.values())}
    return scores


def chance(bundle: Path) -> dict[str, float]:
    """Return the scores of random vectors."""
    import torch

    from vlm.bundle import load_bundle
    from vlm.embedding.embedder import Embedder

    class Noise:
        embed_dim, device = 64, torch.device("cpu")

        def encode_image(self, images: Any) -> Any:
            return torch.nn.functional.normalize(torch.randn(len(images), 64))

        def encode_text(self, tokens: Any) -> Any:
            return self.encode_image(tokens.ids)

    torch.manual_seed(0)
    return score(Embedder(load_bundle(bundle), model=Noise()))


def measure(result: dict[str, Any], out: Path, *, seeds: int) -> None:
    """Train and score what the result lacks, and write it after each run."""
    from vlm.embedding.embedder import Embedder
    from vlm.files import write_file

    missing = [
        name for name in result["variants"]
        if (VARIANTS[name].costs or name) not in result["relative_costs"]
    ]  # fmt: skip
    if missing:
        result["relative_costs"] |= relative_costs(missing)
        write_file(out, (json.dumps(result, indent=1) + "\n").encode())
    for seed in range(seeds):  # all variants of a seed, before those of the next
        for name in result["variants"]:
            variant, runs = VARIANTS[name], result["runs"].setdefault(name, {})
            if str(seed) in runs:
                continue
            with tempfile.TemporaryDirectory(prefix="optimizers_") as temporary:
                folder = Path(temporary)
                steps = round(result["steps"] / result["relative_costs"][variant.costs or name])
                spent = train(variant, folder / "run", steps=steps, seed=seed)
                bundle = folder / "run" / variant.bundle
                scores = score(Embedder.load(bundle, device="cpu"))
                if "chance" not in result:
                    result["chance"] = chance(bundle)
            runs[str(seed)] = {"steps": steps, "cpu_s": spent, "scores": scores}
            write_file(out, (json.dumps(result, indent=1) + "\n").encode())
            print(f"{name}, seed {seed}: {scores[SPLITS[0]]:.4f}", file=sys.stderr)


def table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table with a row a variant: means over seeds, with the extremes."""
    from vlm.markdown import markdown_table

    def cell(values: Sequence[float]) -> str:
        ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{ends}"

    columns = [f"{SPLITS[0]}/{each}" for each in LANGUAGES] + list(SPLITS)
    rows = [
        [
            name,
            f"{statistics.mean(run['steps'] for run in runs.values()):.0f}",
            f"{result['relative_costs'][VARIANTS[name].costs or name]:.2f}",
            *(cell([run["scores"][key] for run in runs.values()]) for key in columns),
        ]
        for name, runs in result["runs"].items()
        if runs
    ]
    rows.append(["chance", "", "", *(f"{result['chance'][key]:.3f}" for key in columns)])
    return markdown_table(["", "steps", "CPU time of a step", *columns], rows)


def main() -> None:
    """Measure what is missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1600, help="of AdamW, whose time all get")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, with seeds 0, 1, ...")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--out", type=Path, default=Path("optimizers.json"))
    options = parser.parse_args()
    result = describe_setting("benchmarks/optimizers.py", threads=1)
    result |= {"steps": options.steps, "relative_costs": {}, "runs": {}}
    if options.out.exists():
        result = json.loads(options.out.read_text(encoding="utf-8"))
        if result["steps"] != options.steps:
            parser.error(f"{options.out} is of {result['steps']} steps; choose another --out")
    result["variants"] = options.variants
    measure(result, options.out, seeds=options.seeds)
    print(json.dumps(result, indent=1))
    print(table(result), file=sys.stderr)


if __name__ == "__main__":
    main()
