"""Measure what data of any size costs a run before its first step, and per sample after it.

Three parts, each in processes of their own: planning batches of a billion samples, the start of a
run on sparse local shards that claim many gigabytes, and the shards that are open at a time. One
JSON object goes to stdout; `fincore` of util-linux counts the bytes of shards that were read.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from setting import describe_setting

SHARDS, SAMPLES_PER_SHARD = 100_000, (9_000, 11_000)


def plan(streams: int, ranks: int, batch: int) -> dict[str, Any]:
    """Plan batches of a billion samples as one rank does."""
    before = time.perf_counter()
    from vlm.batches.mixture import BatchOrder, Mixture
    from vlm.batches.order import SourceOrder

    imported = time.perf_counter() - before
    low, high = SAMPLES_PER_SHARD
    sizes = np.random.default_rng(0).integers(low, high, SHARDS)
    sizes[-1] += 1_000_000_000 - sizes.sum()
    before = time.perf_counter()
    source = SourceOrder("data", sizes, streams)
    order = BatchOrder([source], Mixture(phases=[(None, [1.0])]), batch, world_size=ranks)
    batches = order.batches(order.start(), 10**6)
    samples = len(next(batches))
    first = time.perf_counter() - before
    before, number = time.perf_counter(), 0
    while number < 300_000:
        number += len(next(batches))
    each = (time.perf_counter() - before) / number
    return {
        "streams": streams,
        "ranks": ranks,
        "samples_of_the_first_batch": samples,
        "import_s": imported,
        "first_batch_s": first,
        "us_per_sample": 1e6 * each,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def open_shards(block: int) -> dict[str, Any]:
    """Count the shards that a stream's samples come from, a block after the other."""
    from vlm.batches.order import SourceOrder

    sizes = np.random.default_rng(0).integers(*SAMPLES_PER_SHARD, SHARDS)
    source = SourceOrder("data", sizes, 64, block=block)
    keys, worst = source.read(0, 3, 0, 2_000_000), 0
    window: list[int] = []
    for key in keys:
        if key.place and not window:
            continue
        window.append(key.shard)
        if len(window) == block:
            worst, window = max(worst, len(set(window))), []
    return {
        "block": block,
        "shards_in_a_block": block / sizes.mean(),
        "most_shards_of_as_many_samples": worst,
        "ratio": worst / (block / sizes.mean()),
    }


def sparse_shard(path: Path, *, samples: int, size: int) -> None:
    """Write a tar whose images are followed by holes, so that it claims bytes that no disk has."""
    from PIL import Image

    buffer = BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(buffer, "JPEG")
    image = buffer.getvalue()
    each = size // samples
    with path.open("wb") as file:
        for number in range(samples):
            key = f"{path.stem}/{number:05d}"
            record = json.dumps({"captions": {"en": [f"noise {number}"], "zh": [f"噪声{number}"]}})
            for suffix, content, length in (
                ("json", record.encode(), len(record.encode())), ("jpg", image, each),
            ):  # fmt: skip
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = length
                file.write(member.tobuf(tarfile.USTAR_FORMAT))
                start = file.tell()
                file.write(content)
                file.seek(start + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        file.truncate(file.tell() + 2 * tarfile.BLOCKSIZE)


def start(folder: Path, batch: int, workers: int) -> dict[str, Any]:
    """Open a source, and read the first batch of a run."""
    # As in a run: a process that was spawned would have its workers import torch anew.
    multiprocessing.set_start_method("fork", force=True)
    before = time.perf_counter()
    from vlm.batches.config import CaptionConfig
    from vlm.batches.examples import TrainingExamples
    from vlm.batches.loader import TrainingLoader
    from vlm.batches.mixture import BatchOrder, Mixture
    from vlm.batches.order import SourceOrder
    from vlm.data.config import SourceConfig
    from vlm.data.source import open_source
    from vlm.images.config import AugmentationConfig, PreprocessConfig
    from vlm.images.transforms import TrainingTransform
    from vlm.text.tokenizer import load_tokenizer

    imported = time.perf_counter() - before
    before = time.perf_counter()
    source = open_source(SourceConfig(path=str(folder)))
    opened = time.perf_counter() - before
    plan = SourceOrder("data", np.array(source.sizes))
    order = BatchOrder([plan], Mixture(phases=[(None, [1.0])]), batch)
    transform = TrainingTransform(PreprocessConfig(), AugmentationConfig(), 64)
    examples = TrainingExamples([source], [plan], transform, CaptionConfig(), 0)
    tokenizer = load_tokenizer(Path(__file__).parents[1] / "tokenizers/emoji-zh-en")
    loader = TrainingLoader(examples, order, tokenizer, workers=workers)
    assert len(next(loader.read(order.start(), 1)).uids) == batch
    return {
        "import_s": imported,
        "open_s": opened,
        "first_batch_s": time.perf_counter() - before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def resident(folder: Path) -> int:
    """Return how many bytes of a folder's shards are in the page cache."""
    lines = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", *sorted(folder.glob("*.tar"))],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return sum(map(int, lines))


def local_start(options: argparse.Namespace) -> dict[str, Any]:
    """Make sparse shards, index them, forget what was read of them, and start a run."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, size = Path(name), int(options.gigabytes * 1e9) // options.shards
        for number in range(options.shards):
            path = folder / f"train-{number:05d}.tar"
            sparse_shard(path, samples=options.samples, size=size)
        claimed = sum(path.stat().st_size for path in folder.glob("*.tar"))
        before = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "vlm", "data", "index", folder], check=True, capture_output=True
        )
        indexed = time.perf_counter() - before
        os.sync()
        for path in folder.glob("*.tar"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = resident(folder)
        measured = in_process(start, folder, options.batch, options.workers)
        read = resident(folder) - left
        return {
            "shards": options.shards,
            "gigabytes": claimed / 1e9,
            "index_s": indexed,
            "batch": options.batch,
            **measured,
            "read_mib": read / 2**20,
            "read_ratio": read / claimed,
        }


def in_process(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own, so that its memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=100.0)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--samples", type=int, default=1000, help="in each of these shards")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where to make them; needs a sparse file system"
    )
    options = parser.parse_args()
    plans = [(1, 1, 4096), (64, 1, 65536), (64, 64, 65536)]
    result = {
        "setting": describe_setting("benchmarks/data_scale.py", threads=1),
        "plan": [in_process(plan, *each) for each in plans],
        "open_shards": in_process(open_shards, 1 << 18),
        "start": local_start(options),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
