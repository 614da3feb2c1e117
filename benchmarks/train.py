"""Train one model on the same shards with `vlm train` and with open_clip's trainer, in turn.

Needs what open_clip's trainer needs, in a folder of its own (`--peer`). One JSON object goes to
stdout, a Markdown table to stderr; `benchmarks/README.md` says what is equal and what is not.
Nothing of `vlm` or torch is imported before it is used: the children that run open_clip's trainer
are this same file, and must not pay for it.
"""

import argparse
import json
import logging
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path

import psutil
from loader import OURS, PEER, cell, version_in, watched
from setting import ROOT, describe_setting, leave

EMOJI = ROOT / "data" / "emoji"
CHILD_FLAG = "--child-open-clip"
SHARDS = 8
SIDE = 256
"""Of the images, in pixels: little to decode, so that mostly the step is measured."""
WORDS = {"natural": (10.5, 2.4), "full": (90.0, 0.0)}
"""Mean and deviation of a caption's number of words: those of COCO's captions, which take some 16
tokens; and more than CLIP's 77 tokens hold, so that nobody pads."""
LEARNING_RATE, DECAY, BETAS, EPS, MAX_NORM, WARMUP = 5e-4, 0.2, (0.9, 0.98), 1e-6, 1.0, 1000


# What is read.


def captions_of(words: tuple[float, float]) -> Iterator[str]:
    """Give captions without end of the words of the emoji's names; few are alike."""
    from vlm.data.captions import read_captions

    names = sorted({word for text in read_captions([EMOJI], "en") for word in text.split()})
    rng = random.Random(0)
    while True:
        length = max(round(rng.gauss(*words)), 3)
        yield " ".join(rng.choices(names, k=length))


def write_data(folder: Path, captions: str, samples: int) -> None:
    """Write shards of JPEGs and captions that both systems read: `NUMBER.jpg` and `NUMBER.txt`."""
    from vlm.data.config import SourceConfig
    from vlm.data.source import open_source
    from vlm.images.decoding import decode_image

    source = open_source(SourceConfig(path=str(EMOJI), split="train"))
    texts = captions_of(WORDS[captions])
    images = []
    for sample in islice(source, 1024):
        jpeg = BytesIO()
        decode_image(sample.image).resize((SIDE, SIDE)).save(jpeg, "jpeg", quality=90)
        images.append(jpeg.getvalue())
    pairs = list(zip(range(samples), cycle(images), texts, strict=False))
    for shard in range(SHARDS):
        with tarfile.open(folder / f"train-{shard:05}.tar", "w") as tar:
            for number, image, text in pairs[shard::SHARDS]:
                for extension, content in (("jpg", image), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{number:08}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


# A run of each system.


def our_run(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train with `vlm train`; return its rate and peaks of memory."""
    with tempfile.TemporaryDirectory(prefix="train_") as run:
        command = [
            *launcher(options), "-m", "vlm", "train", f"--model.open_clip={options.model}",
            f"--tokenizer={options.tokenizer}", f"--run_folder={run}/run", "--precision=fp32",
            f"--data.folder={folder}", f"--data.batch_size={options.batch}",
            f"--data.workers={options.workers}", "--captions.languages=[en]",
            "--augmentation.crop_area=[0.9, 1.0]", f"--schedule.steps={options.steps}",
            f"--schedule.warmup_steps={options.steps - 1}", f"--report_every={options.every}",
            "--checkpoint.every_steps=0", f"--optimizer.learning_rate={LEARNING_RATE}",
            f"--optimizer.weight_decay={DECAY}", f"--optimizer.eps={EPS}",
            f"--optimizer.betas={list(BETAS)}", f"--optimizer.max_gradient_norm={MAX_NORM}",
        ]  # fmt: skip
        _, peaks = watched(command, environment(options))
        lines = Path(run, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [each for each in map(json.loads, lines) if each["step"] > options.every]
    # Each record is of as many steps, so that their times are added.
    rate = statistics.harmonic_mean([each["samples_per_s"] for each in records])
    return {"pairs_per_s": rate, "loss": records[-1]["loss"], **peaks}


def peer_run(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train with open_clip's trainer; return the same."""
    with tempfile.TemporaryDirectory(prefix="train_") as run:
        flags = [
            f"--model={options.model}", "--dataset-type=webdataset", "--device=cpu",
            f"--train-data={folder}/train-{{00000..{SHARDS - 1:05}}}.tar", "--precision=fp32",
            f"--train-num-samples={options.steps * options.batch}", "--epochs=1",
            f"--batch-size={options.batch // options.processes}", f"--workers={options.workers}",
            f"--log-every-n-steps={options.every}", "--save-frequency=0", f"--logs={run}",
            "--name=run", f"--lr={LEARNING_RATE}", f"--wd={DECAY}", f"--eps={EPS}",
            f"--beta1={BETAS[0]}", f"--beta2={BETAS[1]}", f"--grad-clip-norm={MAX_NORM}",
            f"--warmup={WARMUP}", "--aug-cfg", "scale=(0.9,1.0)",
        ]  # fmt: skip
        if options.processes > 1:  # features with gradients, as ours, without the whole square
            flags += ["--local-loss", "--gather-with-grad"]
        # In one argument: torch's launcher would take some of them for abbreviations of its own.
        command = [*launcher(options), __file__, CHILD_FLAG, f"{run}/times.json", json.dumps(flags)]
        peer = str(options.peer.resolve())
        _, peaks = watched(command, environment(options) | {"PYTHONPATH": peer})
        times, losses = json.loads(Path(run, "times.json").read_text())
    # The first line comes after one step, the second and all others after `every` more.
    pairs = options.batch * options.every * (len(times) - 2)
    return {"pairs_per_s": pairs / (times[-1] - times[1]), "loss": losses[-1], **peaks}


def launcher(options: argparse.Namespace) -> list[str]:
    """Return the beginning of a command that starts the processes."""
    if options.processes == 1:
        return [sys.executable]
    number = f"--nproc_per_node={options.processes}"
    run = ["-m", "torch.distributed.run", "--standalone", number]
    return [sys.executable, *run]


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Return the environment of both systems: as many threads of each process, and no GPU."""
    threads = max(options.threads // options.processes, 1)
    return dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}


def run_open_clip(times_file: Path, flags: Sequence[str]) -> None:
    """Run open_clip's trainer in this process, and write when it logged which loss."""
    import torch
    from open_clip_train.main import main as open_clip_main

    times: list[float] = []
    losses: list[float] = []

    class Times(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("Train Epoch"):
                times.append(time.perf_counter())
                losses.append(float(text.rsplit("Contrastive_loss: ")[1].split()[0]))

    logging.getLogger().addHandler(Times())
    # It names a device for each process, which torch refuses on a CPU.
    plain = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids: plain(model)
    open_clip_main(list(flags))
    if times:  # the main process
        times_file.write_text(json.dumps([times, losses]))


# Rounds of both.


def table(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> str:
    """Return medians with extremes, and the median of neighbouring runs' ratios."""
    from vlm.markdown import markdown_table

    rows = []
    for case, of in runs.items():
        for key in of[OURS][0]:
            values = {system: [each[key] for each in of[system]] for system in (OURS, PEER)}
            ratios = [a / b for a, b in zip(values[OURS], values[PEER], strict=True)]
            cells = [cell(each, 2) for each in values.values()]
            rows.append([case, key, *cells, cell(ratios, 3)])
    return markdown_table(["captions, processes", "", OURS, PEER, f"{OURS} / {PEER}"], rows)


def main() -> None:
    """Run the benchmark, or the child that calls open_clip's trainer."""
    if sys.argv[1:2] == [CHILD_FLAG]:
        run_open_clip(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="packages of open_clip's trainer")
    parser.add_argument("--model", default="ViT-S-32-alt", help="of open_clip's zoo")
    parser.add_argument("--batch", type=int, default=64, help="pairs of a step, all processes")
    parser.add_argument("--steps", type=int, default=24, help="of a run")
    parser.add_argument("--every", type=int, default=4, help="steps between two reports")
    parser.add_argument("--workers", type=int, default=1, help="of each process's loader")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of all processes together"
    )
    parser.add_argument("--captions", nargs="+", choices=WORDS, default=list(WORDS))
    parser.add_argument("--rounds", type=int, default=3, help="of each system, in turn")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    result = describe_setting("benchmarks/train.py", threads=options.threads)
    result["versions"] |= {
        f"{name}, open_clip's": version_in(options.peer, name) for name in ("webdataset", "pandas")
    }
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="train_data_") as folder:
        from vlm.text.clip_bpe import clip_tokenizer

        options.tokenizer = Path(folder, "tokenizer")
        clip_tokenizer().save(options.tokenizer)
        for captions in options.captions:
            Path(folder, captions).mkdir()
            write_data(Path(folder, captions), captions, 2 * options.steps * options.batch)
        for _ in range(options.rounds):
            for captions in options.captions:
                for processes in options.processes:
                    each = argparse.Namespace(**vars(options) | {"processes": processes})
                    of = runs.setdefault(f"{captions}, {processes}", {OURS: [], PEER: []})
                    of[OURS].append(our_run(Path(folder, captions), each))
                    of[PEER].append(peer_run(Path(folder, captions), each))
    leave(result | {"runs": runs, "load_after": psutil.getloadavg()[0]}, table(runs), options.out)


if __name__ == "__main__":
    main()
