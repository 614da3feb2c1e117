"""Train on data/emoji with `vlm train` and with open_clip's trainer, in the same CPU time.

Needs what open_clip's trainer needs and `vlm` does not: `pip install pandas`. One JSON object
goes to stdout, a Markdown table to stderr; `benchmarks/README.md` says what is equal and what is
not. Nothing of `vlm` or torch is imported before it is used: the child that runs open_clip's
trainer is this same file, and must not pay for it.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setting import ROOT, describe_setting, leave

CONFIG = "configs/train/emoji.yaml"
DATA = ROOT / "data" / "emoji"
CHILD_FLAG = "--child-open-clip"
MODEL_NAME = "emoji-open-clip"
LANGUAGES = ("en", "zh")
CLIP_BPE_SIZE = 49408


class OpenClipEmbedder:
    """A checkpoint of open_clip's trainer with as much of `vlm.Embedder` as scoring calls."""

    languages = LANGUAGES

    def __init__(self, config: Mapping[str, Any], checkpoint: Path) -> None:
        import open_clip

        # Preprocessing is not in the checkpoint: these are the flags it was trained with.
        self.model, _, self.transform = open_clip.create_model_and_transforms(
            MODEL_NAME,
            pretrained=str(checkpoint),
            weights_only=True,
            image_mean=tuple(config["preprocess"]["mean"]),
            image_std=tuple(config["preprocess"]["std"]),
        )
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(MODEL_NAME)

    def encode_image(self, images: Sequence[bytes], *, show_progress_bar: bool = False) -> Any:
        """Return one float32 unit vector an image."""
        import torch

        from vlm.images.decoding import decode_image

        pixels = torch.stack([self.transform(decode_image(image)) for image in images])
        return self.model.encode_image(pixels, normalize=True).numpy()

    def encode_text(self, texts: Sequence[str], *, show_progress_bar: bool = False) -> Any:
        """Return one float32 unit vector a text."""
        return self.model.encode_text(self.tokenizer(list(texts)), normalize=True).numpy()


def run_child(command: Sequence[str], *, threads: int) -> dict[str, float]:
    """Run a command to its end and return the wall and CPU seconds of all its processes."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    child = subprocess.run(command, check=False, cwd=ROOT, env=environment, **pipes)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{child.stdout}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu}


def train_vlm(folder: Path, *, seed: int, steps: int | None, threads: int) -> dict[str, Any]:
    """Train as `CONFIG` says, without evaluating or checkpointing on the way."""
    import yaml

    flags = [f"--seed={seed}", "--evaluation.every_steps=0", "--checkpoint.every_steps=0"]
    # open_clip gets the main captions only, and has AdamW alone, with one rate for both towers.
    flags += ["--captions.second=false", "--optimizer.name=adamw", "--optimizer.learning_rate=3e-3"]
    flags += ["--optimizer.text.learning_rate_ratio=1"]
    flags += ["--model", "configs/model/emoji-tiny.yaml"]  # which open_clip can build
    if steps:
        schedule = yaml.safe_load((ROOT / CONFIG).read_text())["schedule"]
        warmup = steps * schedule["warmup_steps"] // schedule["steps"]
        flags += [f"--schedule.steps={steps}", f"--schedule.warmup_steps={warmup}"]
    command = [sys.executable, "-m", "vlm", "train", "--config", CONFIG, *flags]
    command += [f"--run_folder={folder}"]
    measured = run_child(command, threads=threads)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    samples = config["schedule"]["steps"] * config["data"]["batch_size"]
    pairs = samples * len(config["captions"]["languages"])
    return measured | {"config": config, "samples": samples, "pairs": pairs, "flags": flags}


def write_images(folder: Path) -> list[list[str]]:
    """Write the training images as PNG files; return a row (file, caption) for each pair."""
    from vlm.data.config import SourceConfig
    from vlm.data.source import open_source
    from vlm.images.decoding import decode_image

    (folder / "images").mkdir()
    rows = []
    for i, sample in enumerate(open_source(SourceConfig(path=str(DATA), split="train"))):
        path = folder / "images" / f"{i:05}.png"
        decode_image(sample.image).save(path)
        rows += [[str(path), sample.captions[language][0]] for language in LANGUAGES]
    return rows


def smallest_context() -> int:
    """Return the context length that cuts no main caption, in training or in the benchmarks."""
    from open_clip.tokenizer import SimpleTokenizer

    from vlm.data.config import SourceConfig
    from vlm.data.source import open_source
    from vlm.quickstart import BENCHMARKS

    splits = {"train", *(split for split, _ in BENCHMARKS.values())}
    samples = (
        sample
        for split in splits
        for sample in open_source(SourceConfig(path=str(DATA), split=split))
    )
    texts = {sample.captions[language][0] for sample in samples for language in LANGUAGES}
    tokenizer = SimpleTokenizer()
    return max(len(tokenizer.encode(text)) for text in texts) + 2  # start and end of text


class OpenClipTrainer:
    """Runs open_clip's trainer with the settings of our run, all files in a temporary folder."""

    def __init__(self, folder: Path, config: dict[str, Any], options: argparse.Namespace) -> None:
        import open_clip

        assert config["precision"] == "fp32", "the trainers' bfloat16 modes are not the same"
        self.folder, self.config, self.options = folder, config, options
        self.rows = write_images(folder)
        self.sizes = {"context_length": smallest_context(), "vocab_size": CLIP_BPE_SIZE}
        model_cfg = {key: config["model"][key] for key in ("embed_dim", "vision_cfg")}
        model_cfg["text_cfg"] = config["model"]["text_cfg"] | self.sizes
        self.model_file = folder / f"{MODEL_NAME}.json"
        self.model_file.write_text(json.dumps(model_cfg))
        open_clip.add_model_config(self.model_file)
        self._start, self._epoch = self._calibrate()

    def epochs_in(self, cpu_s: float) -> int:
        """Return how many epochs fit in a CPU time, but at least one."""
        return max(1, int((cpu_s - self._start) / self._epoch))

    def train(self, name: str, *, seed: int, epochs: int, rows: int = 0) -> dict[str, Any]:
        """Train on all rows, or on the first ones for calibration."""
        table, rows = self.folder / f"{name}.csv", rows or len(self.rows)
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerows([["filepath", "title"], *self.rows[:rows]])
        batch = self.config["data"]["batch_size"]
        steps = rows // batch * epochs
        flags = [*self._flags(steps), f"--epochs={epochs}", f"--seed={seed}"]
        here = [f"--train-data={table}", f"--logs={self.folder}", f"--name={name}"]
        command = [sys.executable, __file__, CHILD_FLAG, str(self.model_file), *flags, *here]
        measured = run_child(command, threads=self.options.threads)
        checkpoint = self.folder / name / "checkpoints" / f"epoch_{epochs}.pt"
        counts = {"epochs": epochs, "samples": steps * batch, "pairs": steps * batch}
        return measured | counts | self.sizes | {"flags": flags, "checkpoint": checkpoint}

    def _flags(self, steps: int) -> list[str]:
        """Return our run's settings, for so many steps, as open_clip's trainer takes them."""
        optimizer, schedule = self.config["optimizer"], self.config["schedule"]
        beta1, beta2 = optimizer["betas"]
        warmup = steps * schedule["warmup_steps"] // schedule["steps"]
        flags = [
            f"--model={MODEL_NAME}", "--dataset-type=csv", "--device=cpu", "--precision=fp32",
            f"--batch-size={self.config['data']['batch_size']}",
            f"--workers={self.config['data']['workers']}",
            f"--lr={optimizer['learning_rate']}", f"--wd={optimizer['weight_decay']}",
            f"--beta1={beta1}", f"--beta2={beta2}", f"--eps={optimizer['eps']}",
            f"--grad-clip-norm={optimizer['max_gradient_norm']}",
            f"--warmup={warmup}", "--save-frequency=0",
            "--image-mean", *map(str, self.config["preprocess"]["mean"]),
            "--image-std", *map(str, self.config["preprocess"]["std"]),
        ]  # fmt: skip
        return [*flags, "--aug-cfg", *self.options.aug_cfg]

    def _calibrate(self) -> tuple[float, float]:
        """Return the CPU seconds of starting and of one epoch."""
        batch = int(self.config["data"]["batch_size"])
        one_step = self.train("start", seed=0, epochs=1, rows=batch)["cpu_s"]
        epoch = self.train("epoch", seed=0, epochs=1)["cpu_s"]
        start = one_step - (epoch - one_step) / (len(self.rows) // batch - 1)
        return start, epoch - start


def scored(run: Mapping[str, Any], embedder: Any) -> dict[str, Any]:
    """Return a run's plain measurements with its retrieval scores."""
    from vlm.quickstart import score_benchmarks

    scores = score_benchmarks(embedder, DATA).benchmarks
    return {key: run[key] for key in run if key not in ("config", "checkpoint")} | {
        "samples_per_cpu_s": run["samples"] / run["cpu_s"],
        "parameters": sum(parameter.numel() for parameter in embedder.model.parameters()),
        "scores": {
            f"{name}/{key}": v
            for name, of in scores.items()
            for key, v in of.evaluation.scores.items()
        },
    }


def compare(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Train and score both, once a seed; return the runs of each."""
    from vlm.embedding.embedder import Embedder

    runs: dict[str, list[dict[str, Any]]] = {"vlm": [], "open_clip": []}
    trainer, threads = None, options.threads
    for seed in range(options.seeds):
        ours = train_vlm(folder / f"vlm-{seed}", seed=seed, steps=options.steps, threads=threads)
        config = ours["config"]
        embedder = Embedder.load(folder / f"vlm-{seed}" / "bundle", device="cpu")
        runs["vlm"].append(scored(ours, embedder))
        trainer = trainer or OpenClipTrainer(folder, config, options)
        epochs = trainer.epochs_in(ours["cpu_s"])
        theirs = trainer.train(f"open_clip-{seed}", seed=seed, epochs=epochs)
        peer = OpenClipEmbedder(config, theirs["checkpoint"])
        runs["open_clip"].append(scored(theirs, peer))
    return runs


def results_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a Markdown table of means, with the extremes where there are several runs."""
    from vlm.markdown import markdown_table

    def cell(values: Sequence[float], digits: int) -> str:
        ends = f" ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
        return f"{statistics.mean(values):,.{digits}f}" + (ends if len(values) > 1 else "")

    counts = ("parameters", "wall_s", "cpu_s", "samples", "pairs", "samples_per_cpu_s")
    rows = [[key, *(cell([r[key] for r in of], 0) for of in runs.values())] for key in counts]
    rows += [
        [key, *(cell([r["scores"][key] for r in of], 3) for of in runs.values())]
        for benchmark, cutoffs in (("test_style", (1, 10)), ("test_novel_style", (10,)))
        for direction in ("text_to_image", "image_to_text")
        for language in LANGUAGES
        for key in (f"{benchmark}/{language}/{direction}/recall@{k}" for k in cutoffs)
    ]
    return markdown_table(["system", *runs], rows)


def main() -> None:
    """Run the benchmark, or the child that calls open_clip's trainer."""
    if sys.argv[1:2] == [CHILD_FLAG]:
        import open_clip
        from open_clip_train.main import main as open_clip_main

        open_clip.add_model_config(sys.argv[2])
        open_clip_main(sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="of our run, instead of its configured number")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds 0, 1, ...")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both (all cores)")
    parser.add_argument("--aug-cfg", nargs="*", default=["scale=(0.83,1.0)"], help="open_clip's")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    if find_spec("pandas") is None:
        parser.error("open_clip's trainer reads its table with pandas: pip install pandas")
    result = describe_setting("benchmarks/emoji_training.py", threads=options.threads)
    with tempfile.TemporaryDirectory(prefix="emoji_training_") as folder:
        result["runs"] = compare(options, Path(folder))
    leave(result, results_table(result["runs"]), options.out)


if __name__ == "__main__":
    main()
