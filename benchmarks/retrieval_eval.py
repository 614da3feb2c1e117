"""Measure exact retrieval ranks beside CLIP_benchmark's and Chinese-CLIP's: time, CPU, memory.

Every system has a process of its own, with the same features and threads; they take turns. One
JSON object goes to stdout, a Markdown table to stderr; `benchmarks/README.md` says what is
compared.
"""

import argparse
import json
import multiprocessing
import os
import resource
import runpy
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from setting import describe_setting

CUTOFFS = (1, 5, 10)
TITLES = {
    "clip_benchmark": "CLIP_benchmark `zeroshot_retrieval`, both directions",
    "vlm_both": "vlm `exact_ranks_both`, both directions",
    "cn_clip": "cn_clip `make_topk_predictions`, text to image (scaled)",
    "vlm_one": "vlm `exact_ranks`, text to image",
}
BASE = {"vlm_both": "clip_benchmark", "vlm_one": "cn_clip"}
CN_CLIP_TEXTS = (100, 600)
"""Texts of the two runs whose difference gives cn_clip's time per text."""


def features(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return unit vectors of texts and pictures, and the pairs; captions follow each other."""
    rng = np.random.default_rng(0)
    images = unit(rng.standard_normal((options.images, options.dim), dtype=np.float32))
    owner = np.arange(options.texts) * options.images // options.texts
    texts = unit(rng.standard_normal((options.texts, options.dim), dtype=np.float32))
    texts = unit(texts + np.float32(options.signal) * images[owner])
    return texts, images, np.stack([np.arange(options.texts), owner], axis=1)


def unit(rows: np.ndarray) -> np.ndarray:
    """Divide rows by their lengths, in place."""
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def clip_benchmark_recalls(texts: np.ndarray, images: np.ndarray, pairs: np.ndarray) -> list[float]:
    """Score as `clip_benchmark.metrics.zeroshot_retrieval.evaluate` does after embedding."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = torch.from_numpy(texts) @ torch.from_numpy(images).t()
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(len(scores)), torch.from_numpy(pairs[:, 1])] = True
    recalls = []
    for found, right in ((scores, positive), (scores.T, positive.T)):
        for k in CUTOFFS:
            hits = batchify(recall_at_k, found, right, 64, "cpu", k=k) > 0
            recalls.append(hits.float().mean().item())
    return recalls


def our_recalls(
    texts: np.ndarray, images: np.ndarray, pairs: np.ndarray, *, both: bool
) -> list[float]:
    """Score with our ranks."""
    from vlm.retrieval.metrics import recall_at
    from vlm.retrieval.ranks import exact_ranks, exact_ranks_both

    if both:
        sides = exact_ranks_both(texts, images, pairs, device="cpu")
    else:
        sides = (exact_ranks(texts, images, pairs, device="cpu"),)
    return [recall_at(ranks, k) for ranks in sides for k in CUTOFFS]


def write_features(path: Path, kind: str, rows: np.ndarray) -> None:
    """Write features as cn_clip's scripts read them."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(json.dumps({f"{kind}_id": number, "feature": row.tolist()}) + "\n")


def cn_clip_seconds(folder: Path, texts: int) -> tuple[float, float]:
    """Return wall and CPU seconds of cn_clip's script for the first `texts` texts."""
    import cn_clip.eval
    import torch

    torch.Tensor.cuda = lambda self: self  # the script knows GPUs only
    script = Path(next(iter(cn_clip.eval.__path__))) / "make_topk_predictions.py"
    inputs = [f"--image-feats={folder}/images.jsonl", f"--text-feats={folder}/{texts}.jsonl"]
    sys.argv = [script.name, *inputs, f"--output={folder}/top.jsonl"]
    started, used = time.perf_counter(), time.process_time()
    with open(os.devnull, "w") as silence:
        stdout, sys.stdout = sys.stdout, silence
        stderr, sys.stderr = sys.stderr, silence
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            sys.stdout, sys.stderr = stdout, stderr
    return time.perf_counter() - started, time.process_time() - used


class AnonymousMemory(threading.Thread):
    """Samples the process's own memory, without mapped files, every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stopped = threading.Event()

    @staticmethod
    def now() -> int:
        """Return bytes of anonymous memory in use."""
        fields = Path("/proc/self/status").read_text().split("RssAnon:")[1].split()
        return int(fields[0]) * 1024

    def run(self) -> None:
        """Sample until stopped."""
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, self.now())


def serve(connection: Connection, system: str, options: argparse.Namespace) -> None:
    """Run one system whenever asked, and send what it took."""
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="retrieval_") as name:
        folder = Path(name)
        texts, images, pairs = features(options)
        if system == "cn_clip":
            write_features(folder / "images.jsonl", "image", images)
            for count in CN_CLIP_TEXTS:
                write_features(folder / f"{count}.jsonl", "text", texts[:count])
        while connection.recv():
            sampler = AnonymousMemory()
            before = sampler.now()
            sampler.start()
            started, used = time.perf_counter(), time.process_time()
            recalls: list[float] = []
            if system == "cn_clip":
                runs = [cn_clip_seconds(folder, count) for count in CN_CLIP_TEXTS]
                scale = options.texts / (CN_CLIP_TEXTS[1] - CN_CLIP_TEXTS[0])
                wall, cpu = (scale * (runs[1][k] - runs[0][k]) for k in range(2))
            else:
                if system == "clip_benchmark":
                    recalls = clip_benchmark_recalls(texts, images, pairs)
                else:
                    recalls = our_recalls(texts, images, pairs, both=system == "vlm_both")
                wall, cpu = time.perf_counter() - started, time.process_time() - used
            sampler.stopped.set()
            sampler.join()
            connection.send(
                {
                    "wall_s": wall,
                    "cpu_s": cpu,
                    "recalls": recalls,
                    "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                    "added_mib": (max(sampler.peak, before) - before) / 2**20,
                }
            )


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run the systems in turns; the first round of each also imports and is not timed."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for system in TITLES:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, system, options), daemon=True)
        process.start()
        workers[system] = (process, ours)
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in TITLES}
    for turn in range(options.repeats + 1):
        for system, (_, connection) in workers.items():
            connection.send(True)
            result = connection.recv()
            print(f"round {turn}: {system} {result['wall_s']:.2f} s", file=sys.stderr)
            runs[system].append(result)
    for process, connection in workers.values():
        connection.send(False)
        process.join()
    table: dict[str, Any] = {}
    for system, of_system in runs.items():
        timed = of_system[1:]
        table[system] = {
            key: statistics.median(run[key] for run in timed) for key in ("wall_s", "cpu_s")
        } | {
            "wall_s_all": [run["wall_s"] for run in timed],
            "peak_rss_mib": max(run["peak_rss_mib"] for run in of_system),
            "added_mib": max(run["added_mib"] for run in of_system),
            "recalls": of_system[0]["recalls"],
        }
    for system, base in BASE.items():
        table[system]["times_faster"] = table[base]["wall_s"] / table[system]["wall_s"]
        for key in ("peak_rss_mib", "added_mib"):
            table[system][f"{key}_ratio"] = table[system][key] / table[base][key]
    both, peer = table["vlm_both"]["recalls"], table["clip_benchmark"]["recalls"]
    table["largest_difference"] = max(abs(a - b) for a, b in zip(both, peer, strict=True))
    return table


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Rank memory-mapped features in `processes` processes of one thread."""
    images, texts, dim = options.large
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="retrieval_") as folder:
        rng = np.random.default_rng(0)
        for name, count in (("images", images), ("texts", texts)):
            array = np.lib.format.open_memmap(
                Path(folder) / f"{name}.npy", "w+", np.float32, (count, dim)
            )
            for start in range(0, count, 10_000):
                rows = rng.standard_normal((min(10_000, count - start), dim), dtype=np.float32)
                array[start : start + 10_000] = unit(rows)
            array.flush()
        arguments = (folder, options.processes, options.queries)
        workers = [
            context.Process(target=rank_large, args=(rank, *arguments))
            for rank in range(options.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        ranks = [
            json.loads((Path(folder) / f"{rank}.json").read_text())
            for rank in range(options.processes)
        ]
    return {
        "images": images,
        "texts": texts,
        "dim": dim,
        "queries": options.queries or texts,
        "processes": options.processes,
        "wall_s": max(rank["wall_s"] for rank in ranks),
        "cpu_s": sum(rank["cpu_s"] for rank in ranks),
        "own_memory_mib": max(rank["own_mib"] for rank in ranks),
        "added_mib": max(rank["added_mib"] for rank in ranks),
        "median_rank": ranks[0]["median_rank"],
    }


def rank_large(rank: int, folder: str, processes: int, queries: int | None) -> None:
    """Do one process's share and write what it took."""
    import torch
    import torch.distributed as dist

    from vlm.distributed.groups import world_group
    from vlm.retrieval.metrics import median_rank
    from vlm.retrieval.ranks import exact_ranks_both

    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
        )
    images, texts = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("images", "texts"))
    texts = texts[:queries]
    pairs = np.stack([np.arange(len(texts)), np.arange(len(texts)) % len(images)], axis=1)
    sampler = AnonymousMemory()
    before = sampler.now()
    sampler.start()
    started, used = time.perf_counter(), time.process_time()
    found = exact_ranks_both(
        texts, images, pairs, device="cpu", group=world_group(), show_progress_bar=rank == 0
    )
    record = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - used,
        "own_mib": sampler.peak / 2**20,
        "added_mib": (sampler.peak - before) / 2**20,
        "median_rank": [median_rank(ranks) for ranks in found],
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(record))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def markdown(results: dict[str, Any]) -> str:
    """Return the tables for people; ratios are to the peer of the row before."""
    lines = [
        "| system | wall s | CPU s | peak MiB of the process | MiB added by scoring |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for system, row in ((s, results["systems"][s]) for s in TITLES if "systems" in results):
        wall = f"{row['wall_s']:.2f}"
        memory = [f"{row[key]:,.0f}" for key in ("peak_rss_mib", "added_mib")]
        if system in BASE:
            wall += f" ({row['times_faster']:.1f} times faster)"
            ratios = [row["peak_rss_mib_ratio"], row["added_mib_ratio"]]
            memory = [f"{m} ({ratio:.3f}x)" for m, ratio in zip(memory, ratios, strict=True)]
        lines.append(f"| {TITLES[system]} | {wall} | {row['cpu_s']:.2f} | {' | '.join(memory)} |")
    if "large" in results:
        row = results["large"]
        lines += [
            "",
            f"{row['images']:,} pictures x {row['queries']:,} of {row['texts']:,} texts x "
            f"{row['dim']}, {row['processes']} processes of one thread: {row['wall_s']:.0f} s, "
            f"{row['cpu_s']:.0f} CPU s, {row['own_memory_mib']:,.0f} MiB of own memory a process, "
            f"of which {row['added_mib']:,.0f} MiB added by ranking.",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25_010)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--signal", type=float, default=0.15, help="of its picture in a caption")
    parser.add_argument("--threads", type=int, default=1, help="of each system")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each system")
    parser.add_argument(
        "--large", type=int, nargs=3, metavar=("IMAGES", "TEXTS", "DIM"),
        help="instead: rank so many memory-mapped features, for example 100000 500000 512",
    )  # fmt: skip
    parser.add_argument("--queries", type=int, help="with --large: only the first texts")
    parser.add_argument("--processes", type=int, default=2, help="with --large")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    threads = 1 if options.large else options.threads
    results = describe_setting("benchmarks/retrieval_eval.py", threads=threads)
    if options.large:
        results["large"] = large(options)
    else:
        results |= {key: getattr(options, key) for key in ("images", "texts", "dim", "signal")}
        results["systems"] = compare(options)
    results["load_after"] = os.getloadavg()[0]
    text = json.dumps(results, indent=1)
    print(text)
    print(markdown(results), file=sys.stderr)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
