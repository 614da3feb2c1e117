"""Read training batches with `vlm` and with open_clip's WebDataset pipeline, side by side.

Needs what open_clip's trainer needs, in a folder of its own (`--peer`). One JSON object goes to
stdout, a Markdown table to stderr; `benchmarks/README.md` says what is counted and how. Each round
of a system is a process of its own, this same file, with its loader workers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import distributions, version
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from setting import ROOT, describe_setting, leave

EMOJI = ROOT / "data" / "emoji"
CHILD_FLAG = "--child"
OURS, PEER = "vlm", "open_clip"
SHARDS = 8
"""open_clip's loader wants at least one for each worker."""
PREFETCHED = 2
"""Batches that each loader worker prepares ahead: torch's default."""


# What is read.


def write_data(images: Sequence[Path], folder: Path) -> None:
    """Write the same images and captions as shards of each system, unpacked."""
    from vlm.data.captions import read_captions
    from vlm.data.indexing import index_folder

    captions = cycle(sorted(set(read_captions([EMOJI], "en"))))
    pairs = list(zip(images, captions, strict=False))
    for system, extension in ((OURS, "json"), (PEER, "txt")):
        (folder / system).mkdir()
        for shard in range(SHARDS):
            with tarfile.open(folder / system / f"train-{shard:05}.tar", "w") as tar:
                for number, (image, caption) in list(enumerate(pairs))[shard::SHARDS]:
                    text = caption
                    if system == OURS:
                        text = json.dumps({"captions": {"en": [caption]}, "concept": str(number)})
                    for name, content in (("jpg", image.read_bytes()), (extension, text.encode())):
                        member = tarfile.TarInfo(f"{number:08}.{name}")
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
    index_folder(folder / OURS)


def our_batches(folder: Path, options: argparse.Namespace) -> Iterator[Any]:
    """Give batches as `vlm train` reads them, with its default augmentation."""
    from vlm.batches.config import CaptionConfig
    from vlm.batches.examples import TrainingExamples
    from vlm.batches.loader import TrainingLoader
    from vlm.batches.mixture import BatchOrder, Mixture
    from vlm.batches.order import SourceOrder
    from vlm.data.config import SourceConfig
    from vlm.data.source import open_source
    from vlm.images.config import AugmentationConfig, PreprocessConfig
    from vlm.images.transforms import TrainingTransform
    from vlm.text.clip_bpe import clip_tokenizer

    source = open_source(SourceConfig(path=str(folder)))
    orders = [SourceOrder("data", np.array(source.sizes))]
    order = BatchOrder(orders, Mixture(phases=[(None, [1.0])]), options.batch)
    transform = TrainingTransform(PreprocessConfig(), AugmentationConfig(), options.size)
    captions = CaptionConfig(languages=("en",))
    examples = TrainingExamples([source], orders, transform, captions, seed=0)
    loader = TrainingLoader(examples, order, clip_tokenizer(), workers=options.workers)
    return loader.read(order.start(), options.batches)


def peer_batches(folder: Path, options: argparse.Namespace) -> Iterator[Any]:
    """Give batches as open_clip's trainer reads WebDatasets, with its default augmentation."""
    from open_clip import SimpleTokenizer, image_transform
    from open_clip_train.data import get_wds_dataset

    settings = argparse.Namespace(
        train_data=str(folder / f"train-{{00000..{SHARDS - 1:05}}}.tar"),
        train_num_samples=options.batches * options.batch,
        train_data_upsampling_factors=None,
        batch_size=options.batch, workers=options.workers, world_size=1, seed=0,
    )  # fmt: skip
    transform = image_transform(options.size, is_train=True)
    data = get_wds_dataset(settings, transform, is_train=True, tokenizer=SimpleTokenizer())
    return iter(data.dataloader)


# One round of one system, in a child.


def run_child(system: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Read batches and do nothing with them; return rates after the first few."""
    import torch

    torch.set_num_threads(1)
    read: Callable[..., Iterator[Any]] = our_batches if system == OURS else peer_batches
    started, me = time.perf_counter(), psutil.Process()
    batches = read(folder, options)
    size = len(images_of(next(batches)))
    start_s = time.perf_counter() - started
    for _ in islice(batches, PREFETCHED * options.workers):
        pass
    wall, cpu = time.perf_counter(), cpu_of(me)
    images = sum(len(images_of(batch)) for batch in islice(batches, options.counted))
    wall, cpu = time.perf_counter() - wall, [b - a for a, b in zip(cpu, cpu_of(me), strict=True)]
    assert (size, images) == (options.batch, options.batch * options.counted)
    return {
        "images_per_s": images / wall,
        "cpu_ms_per_image": sum(cpu) / images * 1000,
        "main_cpu_ms_per_image": cpu[0] / images * 1000,
        "start_s": start_s,
    }


def images_of(batch: Any) -> Any:
    """Return the tensor of a batch's images."""
    return batch[0] if isinstance(batch, list | tuple) else batch.images


def cpu_of(process: psutil.Process) -> tuple[float, float]:
    """Return the CPU seconds of a process, and of its children together."""
    own, *rest = (sum(each.cpu_times()[:2]) for each in (process, *process.children()))
    return own, sum(rest)


# Rounds of both.


def measure(system: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run a round in a child and watch the memory of all its processes."""
    flags = [
        f"--{name}={getattr(options, name)}" for name in ("batch", "workers", "size", "counted")
    ]
    command = [sys.executable, __file__, CHILD_FLAG, system, str(folder / system), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if system == PEER:
        environment["PYTHONPATH"] = str(options.peer.resolve())
    output, peaks = watched(command, environment)
    found: dict[str, float] = json.loads(output)
    return found | peaks


def watched(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, dict[str, float]]:
    """Run a command; return its output and the peaks of memory of all its processes in MiB."""
    peaks = {"peak_mib": 0.0, "peak_own_mib": 0.0}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command, stdout=out, stderr=err, env=environment, text=True)
        while child.poll() is None:
            whole, mapped = memory_of(child.pid)
            peaks["peak_mib"] = max(peaks["peak_mib"], whole)
            peaks["peak_own_mib"] = max(peaks["peak_own_mib"], whole - mapped)
            time.sleep(0.25)
        out.seek(0), err.seek(0)
        if child.returncode:
            end = err.read()[-3000:]
            raise SystemExit(f"{' '.join(command)} ended with {child.returncode}:\n{end}")
        return out.read(), peaks


def memory_of(pid: int) -> tuple[float, float]:
    """Return the MiB of a process and its children, each page once; and those of mapped files."""
    whole = mapped = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in processes:
            rows = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            sizes = {name: int(size) for name, size, *_ in map(str.split, rows)}
            whole += sizes["Pss:"]
            mapped += sizes["Pss_File:"]
    except (psutil.NoSuchProcess, OSError):
        return 0.0, 0.0  # one of them has just ended; the next look finds the others
    return whole / 1024, mapped / 1024


def table(rounds: dict[str, list[dict[str, float]]]) -> str:
    """Return a Markdown table of medians with extremes, and the median of each round's ratio."""
    from vlm.markdown import markdown_table

    rows = []
    for key in rounds[OURS][0]:
        values = {system: [each[key] for each in of] for system, of in rounds.items()}
        ratios = [a / b for a, b in zip(values[OURS], values[PEER], strict=True)]
        rows.append([key, *(cell(of, 2) for of in values.values()), cell(ratios, 3)])
    return markdown_table(["", *rounds, f"{OURS} / {PEER}"], rows)


def cell(values: Sequence[float], digits: int) -> str:
    """Return the median of some numbers, and their extremes."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def version_in(folder: Path, package: str) -> str:
    """Return the version of a package that was installed into a folder."""
    found = distributions(name=package, path=[str(folder)])
    return next(iter(found)).version


def main() -> None:
    """Run the benchmark, or a child that reads with one system."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="a folder of JPEGs")
    parser.add_argument("--peer", type=Path, help="folder of the packages of open_clip's trainer")
    parser.add_argument("--batch", type=int, default=128, help="images")
    parser.add_argument("--workers", type=int, default=2, help="of the loader")
    parser.add_argument("--size", type=int, default=224, help="side of a crop, in pixels")
    parser.add_argument("--counted", type=int, default=24, help="batches that are timed")
    parser.add_argument("--rounds", type=int, default=5, help="of each system, in turn")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    parser.add_argument(CHILD_FLAG, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # The workers are still busy when the last counted batch comes, as when the first did.
    options.batches = options.counted + 2 * (1 + PREFETCHED * options.workers)
    if options.child:
        system, folder = options.child
        print(json.dumps(run_child(system, Path(folder), options)), flush=True)
        return
    if not options.images or not options.peer:
        parser.error("--images and --peer are needed")
    images = sorted(options.images.glob("*.jpg"))
    if len(images) < options.batch:
        parser.error(f"{options.images} has {len(images)} files *.jpg; expected at least a batch")
    result = describe_setting("benchmarks/loader.py", threads=1)
    result["versions"] |= {name: version(name) for name in ("pillow", "torchvision")}
    result["versions"] |= {
        f"{name}, open_clip's": version_in(options.peer, name) for name in ("webdataset", "pandas")
    }
    result |= {"images": len(images), "bytes": sum(path.stat().st_size for path in images)}
    rounds: dict[str, list[dict[str, float]]] = {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory(prefix="loader_") as folder:
        write_data(images, Path(folder))
        for _ in range(options.rounds):
            for system, done in rounds.items():
                done.append(measure(system, Path(folder), options))
    leave(result | {"rounds": rounds}, table(rounds), options.out)


if __name__ == "__main__":
    main()
