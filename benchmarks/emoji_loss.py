"""Train on data/emoji with different losses and all else equal, in several processes.

The exact mesh loss, groups of half the ranks, groups of one, and open_clip's `ClipLoss` in the
place of ours, for the same steps on the same batches. One JSON object goes to stdout, a Markdown
table to stderr; `benchmarks/README.md` says what is equal.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from setting import ROOT, describe_setting, leave

CONFIG = "configs/train/emoji.yaml"
CHILD_FLAG = "--child-open-clip"
SCORES = ("test_style", "test_novel_style")


def open_clip_step(run: Any) -> Any:
    """Return a step with open_clip's loss for a run: the mean over languages."""
    import torch
    import torch.distributed as dist
    from open_clip import ClipLoss

    from vlm.training.step import StepOutput

    world = dist.get_world_size()
    contrast = ClipLoss(
        local_loss=True, gather_with_grad=True, rank=dist.get_rank(), world_size=world
    )

    def step(parts: Sequence[Any]) -> Any:
        (batch,) = parts
        head = next(iter(run.model(batch.images, batch.texts).heads.values()))
        losses = [contrast(head.image, text, head.logit_scale) for text in head.text.values()]
        loss = torch.stack(losses).mean()
        run.accelerator.backward(loss)
        seen = SimpleNamespace(accuracy=torch.zeros(()), candidates=world * len(head.image))
        return StepOutput(loss=loss.detach(), parts={}, terms={"image-text": seen})

    return step


def train_child(arguments: Sequence[str]) -> None:
    """Run `vlm train` with open_clip's loss."""
    import warnings
    from dataclasses import replace

    from jsonargparse import ArgumentParser

    from vlm.training.build import build_run
    from vlm.training.config import TrainConfig

    warnings.filterwarnings("ignore", message=".*all_gather is deprecated", category=FutureWarning)
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TrainConfig, as_group=False)
    options = parser.instantiate(parser.parse_args(list(arguments)[1:]))
    fields = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__}
    run = build_run(TrainConfig(**fields))
    replace(run, step=open_clip_step(run)).fit()


def systems(processes: int) -> dict[str, list[str]]:
    """Return the flags of each system; open_clip's loss has none."""
    return {
        "open_clip ClipLoss": [],
        "vlm exact": [],
        f"vlm groups of {processes // 2}": [f"--loss.plan.group_size={processes // 2}"],
        "vlm groups of 1": ["--loss.plan.group_size=1"],
    }


def train(name: str, flags: Sequence[str], folder: Path, options: argparse.Namespace) -> None:
    """Train one system in a world of its own."""
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
        "--num_processes", str(options.processes), "--mixed_precision", "no",
        "--dynamo_backend", "no",
    ]  # fmt: skip
    program = (
        [str(Path(__file__).resolve()), CHILD_FLAG]
        if name.startswith("open_clip")
        else ["-m", "vlm"]
    )
    settings = [
        "train", "--config", CONFIG, f"--run_folder={folder}", f"--seed={options.seed}",
        "--evaluation.every_steps=0", "--checkpoint.every_steps=0", "--captions.second=false",
        f"--schedule.steps={options.steps}", f"--schedule.warmup_steps={options.steps // 10}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        [*launch, *program, *settings, *flags], cwd=ROOT, env=environment, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if child.returncode:
        raise SystemExit(f"{name} ended with {child.returncode}:\n{child.stdout[-3000:]}")


def score(folder: Path) -> dict[str, Any]:
    """Return a run's last loss and the retrieval scores of its bundle."""
    from vlm.embedding.embedder import Embedder
    from vlm.quickstart import score_benchmarks

    embedder = Embedder.load(folder / "bundle", device="cpu")
    scores = score_benchmarks(embedder, ROOT / "data" / "emoji").benchmarks
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    flat = {
        f"{name}/{key}": value
        for name, of in scores.items()
        for key, value in of.evaluation.scores.items()
    }
    return {"last_losses": statistics.mean(losses[-5:]), "scores": flat}


def table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a Markdown table of means over seeds, with the extremes."""
    from vlm.markdown import markdown_table

    def cell(values: Sequence[float]) -> str:
        ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{ends}"

    keys = [
        f"{name}/{language}/{direction}/recall@{k}"
        for name in SCORES
        for direction in ("text_to_image", "image_to_text")
        for language in ("en", "zh")
        for k in (1, 10)
    ]
    rows = [["last losses", *(cell([r["last_losses"] for r in of]) for of in runs.values())]]
    rows += [[key, *(cell([r["scores"][key] for r in of]) for of in runs.values())] for key in keys]
    return markdown_table(["loss", *runs], rows)


def main() -> None:
    """Train, score and print; or be the child that trains with open_clip's loss."""
    if sys.argv[1:2] == [CHILD_FLAG]:
        train_child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each, one a seed")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--groups-of-1", action="store_true", help="measure these as well")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    setting = describe_setting("benchmarks/emoji_loss.py", threads=1)
    compared = systems(options.processes)
    if not options.groups_of_1:
        del compared["vlm groups of 1"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
    with tempfile.TemporaryDirectory(prefix="emoji_loss_") as folder:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            options.seed = seed
            for name, flags in compared.items():
                run_folder = Path(folder) / f"{name.replace(' ', '-')}-{seed}"
                train(name, flags, run_folder, options)
                runs[name].append(score(run_folder))
                print(f"trained {name}, seed {seed}", file=sys.stderr)
    leave(setting | {"runs": runs}, table(runs), options.out)


if __name__ == "__main__":
    main()
