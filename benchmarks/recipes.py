"""Train the emoji recipe with one thing changed at a time, in equal time, on styles kept out.

The time is that of a number of the recipe's own steps. Short runs of variants in turn give the
processor time of a step in the recipe's, from which follow each one's steps. Run n keeps the nth
drawing style of the training split out and scores on it; its seed is n modulo 3. What is done is
in `--out`, and is not done again: the command may be stopped and given once more. One JSON object
goes to stdout, a Markdown table to stderr.
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
DATA = "data/emoji"
SHORT, SHORTER = 130, 50  # steps; the first 40 or so decode the images
ROUNDS = 3  # of short runs
BASE = "the recipe"
STYLES = (
    "twemoji", "fluent_flat", "emojione", "fxemoji", "noto_blob", "fluent_3d",
    "fluent_high_contrast",
)  # fmt: skip
SEEDS = 3
LANGUAGES = ("zh", "en")
PART = "choose"  # of the questions; the other one is for reports
DIRECTIONS = ("text_to_image", "image_to_text")
EVERYDAY = ("hit@1", "hit@5")


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe, and which bundle of the run is scored."""

    flags: tuple[str, ...] = ()
    """Options of `vlm train`; `$most` stands for 70 % of the run's steps, `$few` for 4 %."""
    bundle: str = "bundle"
    costs: str | None = None
    """The variant whose step takes as long by construction; None where it is measured."""


ADAMW = ("--optimizer.name=adamw", "--optimizer.learning_rate=3e-3")
LAST_CHECKPOINTS = (
    "--averaging.last_checkpoints=5", "--checkpoint.keep=5", "--checkpoint.every_steps=$few",
)  # fmt: skip
SMALL_FIRST = '--stages=[{"steps": $most, "image_size": 36}, {"goes_on": true}]'
ENDINGS = {"en": ["many {}s", "{}y", "it is {}ing", "{}ed", "a {}y day", "{}ing a {}"]}
CODE_SWITCHED = {"en": ["a {zh}", "a picture of a {zh}"], "zh": ["一只{en}", "{en}的图片"]}


def with_templates(others: Mapping[str, Sequence[str]]) -> str:
    """Return an option that gives the recipe's templates and others."""
    import yaml

    templates = yaml.safe_load((ROOT / CONFIG).read_text(encoding="utf-8"))["captions"]["templates"]
    both = {language: [*own, *others.get(language, ())] for language, own in templates.items()}
    return f"--captions.templates={json.dumps(both)}"


VARIANTS = {
    BASE: Variant(),
    "endings of words": Variant((with_templates(ENDINGS),), costs=BASE),
    "words of the other language": Variant((with_templates(CODE_SWITCHED),), costs=BASE),
    "mean of the last map, not all of it": Variant(
        ("--model.vision_cfg.timm_pool=avg",), costs=BASE
    ),
    "timm's own last map": Variant(("--model.vision_cfg.timm_output_stride=null",)),
    "twice as fine a last map": Variant(("--model.vision_cfg.timm_output_stride=8",)),
    "a transformer of one layer": Variant(
        ("--model.text_cfg.layers=1", "--model.text_cfg.heads=2")
    ),
    "a third of the rate": Variant(("--optimizer.learning_rate=3e-3",), costs=BASE),
    "twice the rate": Variant(("--optimizer.learning_rate=2e-2",), costs=BASE),
    "no composed captions": Variant(("--captions.composed_ratio=0",), costs=BASE),
    "composed captions only": Variant(("--captions.composed_ratio=1",), costs=BASE),
    "no second captions": Variant(("--captions.second=false",)),
    "second captions at 0.4": Variant(("--loss.second_weight=0.4",), costs=BASE),
    "hue 25, greyscale 0.2": Variant(
        ("--augmentation.hue=25", "--augmentation.grayscale=0.2"), costs=BASE
    ),
    "batches by subgroup": Variant(("--data.mixture.batch_by=subgroup",), costs=BASE),
    "batches of 64": Variant(("--data.batch_size=64",)),
    "AdamW": Variant(ADAMW),
    "EMA": Variant(("--averaging.ema_decay=0.99",), "bundle-ema"),
    "last 5 checkpoints": Variant(LAST_CHECKPOINTS, "bundle-mean"),
    "linear to 0": Variant(("--schedule.shape=linear",), costs=BASE),
    "36 pixels, then 48": Variant((SMALL_FIRST,)),
    "image tower at 0.5": Variant(("--optimizer.image.learning_rate_ratio=0.5",), costs=BASE),
    "text tower at 0.5": Variant(("--optimizer.text.learning_rate_ratio=0.5",), costs=BASE),
}


def train(variant: Variant, folder: Path, *, steps: int, place: int = 0) -> float:
    """Train once without a style; return the processor seconds of the run and its loader."""
    source = {"path": DATA, "where": [f"source!={STYLES[place]}"]}
    settings = [
        "--config", CONFIG, f"--run_folder={folder}", f"--seed={place % SEEDS}",
        f"--data.sources={json.dumps([source])}",
        "--evaluation.every_steps=0", "--checkpoint.every_steps=0",
        f"--schedule.steps={steps}", f"--schedule.warmup_steps={steps * 9 // 100}",
    ]  # fmt: skip
    lengths = {"most": steps * 7 // 10, "few": max(steps // 25, 1)}
    flags = [Template(flag).substitute(lengths) for flag in variant.flags]
    command = [sys.executable, "-m", "vlm", "train", *settings, *flags]
    return run_child(command, threads=1)["cpu_s"]


def step_seconds(variant: Variant, folder: Path) -> float:
    """Return the processor seconds of a step, from the difference of two short runs."""
    times = [train(variant, folder / f"{steps}-steps", steps=steps) for steps in (SHORT, SHORTER)]
    return (times[0] - times[1]) / (SHORT - SHORTER)


def relative_costs(names: Sequence[str]) -> dict[str, float]:
    """Return the processor time of a step in steps of `BASE`, of what variants cost as much as."""
    kinds = dict.fromkeys([BASE, *(VARIANTS[name].costs or name for name in names)])
    rounds = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="recipes_") as temporary:
            rounds.append(
                {
                    kind: step_seconds(VARIANTS[kind], Path(temporary, str(number)))
                    for number, kind in enumerate(kinds)
                }
            )
    # Ratios within a round: how long a step takes depends on what else the machine does.
    return {kind: statistics.median(each[kind] / each[BASE] for each in rounds) for kind in kinds}


def score(embedder: Any, place: int) -> dict[str, float]:
    """Return what a model finds in the style that it has not seen, and what raw pixels do."""
    from vlm.evaluation.config import RetrievalSource
    from vlm.evaluation.retrieval.baselines import pixel_ranks
    from vlm.evaluation.retrieval.metrics import scores_of
    from vlm.evaluation.retrieval.run import evaluate

    style = STYLES[place]
    source = RetrievalSource(
        path=DATA, name=style, split="train", where=[f"source={style}"],
        questions=ROOT / DATA / "questions.yaml", part=PART,
    )  # fmt: skip
    found = evaluate(embedder, [source]).benchmarks[style]
    pixels = scores_of(pixel_ranks(found.pairs, references(style)))
    names = [
        f"{language}/{direction}/recall@1" for language in LANGUAGES for direction in DIRECTIONS
    ]
    everyday = dict(found.everyday.scores)
    return {
        **{name: found.evaluation.scores[name] for name in names},
        "R@1": statistics.mean(found.evaluation.scores[name] for name in names),
        "pixels": statistics.mean(pixels[name] for name in names),
        **everyday,
        **{
            kind: statistics.mean(everyday[f"{language}/{kind}"] for language in LANGUAGES)
            for kind in EVERYDAY
        },
        "chance": found.baselines["chance"][names[0]],
        "hit@5 by chance": found.everyday.chance["hit@5"],
    }


def references(style: str) -> Any:
    """Return the images that training saw."""
    from vlm.data.config import SourceConfig
    from vlm.data.source import open_source

    return open_source(SourceConfig(path=DATA, where=(f"source!={style}",)))


def measure(result: dict[str, Any], out: Path, *, styles: int) -> None:
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
    for place, style in enumerate(STYLES[:styles]):  # all variants of one, before the next
        for name in result["variants"]:
            variant, runs = VARIANTS[name], result["runs"].setdefault(name, {})
            if style in runs:
                continue
            with tempfile.TemporaryDirectory(prefix="recipes_") as temporary:
                folder = Path(temporary, "run")
                steps = round(result["steps"] / result["relative_costs"][variant.costs or name])
                spent = train(variant, folder, steps=steps, place=place)
                scores = score(Embedder.load(folder / variant.bundle, device="cpu"), place)
            runs[style] = {"steps": steps, "cpu_s": spent, "scores": scores}
            write_file(out, (json.dumps(result, indent=1) + "\n").encode())
            print(f"{name}, {style}: {scores['R@1']:.4f}", file=sys.stderr)


def table(result: Mapping[str, Any]) -> str:
    """Return a Markdown table with a row a variant: means over styles, with the extremes."""
    from vlm.markdown import markdown_table

    base = result["runs"].get(BASE, {})

    def cell(runs: Mapping[str, Any], kind: str) -> str:
        """Return the mean, and how far it is from the recipe's on the same styles."""
        mean = statistics.mean(run["scores"][kind] for run in runs.values())
        if runs is base or not set(runs) <= set(base):
            return f"{mean:.3f}"
        moved = [run["scores"][kind] - base[style]["scores"][kind] for style, run in runs.items()]
        return f"{mean:.3f} ({min(moved):+.3f} to {max(moved):+.3f})"

    rows = [
        [
            name,
            str(len(runs)),
            f"{statistics.mean(run['steps'] for run in runs.values()):.0f}",
            f"{statistics.mean(run['cpu_s'] for run in runs.values()):.0f}",
            *(cell(runs, kind) for kind in ("R@1", *EVERYDAY)),
        ]
        for name, runs in result["runs"].items()
        if runs
    ]
    for kind in ("pixels", "chance"):
        mean = statistics.mean(run["scores"][kind] for run in base.values())
        rows.append([kind, "", "", "", f"{mean:.3f}", "", ""])
    return markdown_table(["", "styles", "steps", "CPU s", "R@1", *EVERYDAY], rows)


def main() -> None:
    """Measure what is missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of the recipe, whose time all get")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument(
        "--styles", type=int, default=len(STYLES), help="how many of them to keep out, one a run"
    )
    parser.add_argument("--out", type=Path, default=Path("recipes.json"))
    options = parser.parse_args()
    result = describe_setting("benchmarks/recipes.py", threads=1)
    result |= {"steps": options.steps, "relative_costs": {}, "runs": {}}
    if options.out.exists():
        result = json.loads(options.out.read_text(encoding="utf-8"))
        if result["steps"] != options.steps:
            parser.error(f"{options.out} is of {result['steps']} steps; choose another --out")
    result["variants"] = options.variants
    measure(result, options.out, styles=options.styles)
    print(json.dumps(result, indent=1))
    print(table(result), file=sys.stderr)


if __name__ == "__main__":
    main()
