"""Measure exact retrieval scoring next to CLIP_benchmark's and Chinese-CLIP's: time, CPU, memory.

Every system has a process of its own, with the same features and threads; they take turns. One
JSON object goes to stdout, Markdown tables to stderr; `benchmarks/README.md` says what is
compared. Memory is read from `/proc`, so that it runs on Linux only.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from setting import describe_setting, leave

CUTOFFS = (1, 5, 10)
FEATURES = ("texts", "images", "pairs")
TITLES = {
    "clip_benchmark": "CLIP_benchmark `zeroshot_retrieval`, both directions",
    "vlm": "vlm `compare`, both directions, first images and cosines",
    "cn_clip": "cn_clip `make_topk_predictions`, text to image (scaled)",
}
COMPARED = ("images", "texts", "dim", "signal", "mapped")
STAGES = ("after_torch", "before_scoring", "peak", "added")
BASE = {"vlm": "clip_benchmark", "other": "clip_benchmark"}
OTHER = "another checkout of vlm, the same work"  # with --beside
CN_CLIP_TEXTS = (100, 600)
"""Texts of the two runs whose difference gives cn_clip's time per text."""


def features(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return unit vectors of texts and images, and the pairs; captions follow each other."""
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


def our_recalls(texts: np.ndarray, images: np.ndarray, pairs: np.ndarray) -> list[float]:
    """Score with our ranks; the pass also finds first images and the statistics of cosines."""
    from vlm.evaluation.retrieval.comparison import compare
    from vlm.evaluation.retrieval.metrics import recall_at

    found = compare(texts, images, pairs, device="cpu")
    sides = (found.text_to_image, found.image_to_text)
    return [recall_at(ranks, k) for ranks in sides for k in CUTOFFS]


def other_recalls(
    folder: Path, texts: np.ndarray, images: np.ndarray, pairs: np.ndarray
) -> list[float]:
    """Score with the `vlm` of another checkout, which may be from before `compare`.

    There ranks, first images and the statistics of cosines took a pass each.
    """
    sys.path.insert(0, str(folder.resolve()))
    import vlm

    if not Path(vlm.__file__).is_relative_to(folder.resolve()):
        raise SystemExit(f"found vlm in {vlm.__file__}; expected the one in {folder}")
    if (folder / "vlm" / "evaluation").is_dir():
        return our_recalls(texts, images, pairs)
    from vlm.retrieval.cosines import cosine_statistics
    from vlm.retrieval.metrics import recall_at
    from vlm.retrieval.nearest import nearest
    from vlm.retrieval.ranks import exact_ranks_both

    sides = exact_ranks_both(texts, images, pairs, device="cpu")
    nearest(texts, images, device="cpu")
    cosine_statistics(texts, images, pairs, device="cpu")
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


def memory_mib(name: str) -> float:
    """Return a field of this process's status: `RssAnon`, `VmRSS`, or `VmHWM`, the most ever."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def memory_now() -> dict[str, float]:
    """Return what this process has in memory, and how much of it is its own: no mapped files."""
    return {"whole_mib": memory_mib("VmRSS"), "anonymous_mib": memory_mib("RssAnon")}


class AnonymousMemory(threading.Thread):
    """Samples the process's own memory, without mapped files, every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = memory_mib("RssAnon")
        self.stopped = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        while not self.stopped.wait(0.005):
            self.peak = max(self.peak, memory_mib("RssAnon"))


def serve(connection: Connection, system: str, folder: Path, options: argparse.Namespace) -> None:
    """Run one system whenever asked, and send what it took."""
    import torch

    torch.set_num_threads(options.threads)
    memory = {"after_torch": memory_now()}
    arrays = []
    if system != "cn_clip":  # it reads its own files
        mode = "r" if options.mapped else None
        arrays = [np.load(folder / f"{name}.npy", mmap_mode=mode) for name in FEATURES]
    memory["before_scoring"] = memory_now()
    sampler = AnonymousMemory()
    sampler.start()
    while connection.recv():
        started, used = time.perf_counter(), time.process_time()
        recalls: list[float] = []
        if system == "cn_clip":
            runs = [cn_clip_seconds(folder, count) for count in CN_CLIP_TEXTS]
            scale = options.texts / (CN_CLIP_TEXTS[1] - CN_CLIP_TEXTS[0])
            wall, cpu = (scale * (runs[1][k] - runs[0][k]) for k in range(2))
        else:
            if system == "clip_benchmark":
                recalls = clip_benchmark_recalls(*arrays)
            elif system == "other":
                recalls = other_recalls(options.beside, *arrays)
            else:
                recalls = our_recalls(*arrays)
            wall, cpu = time.perf_counter() - started, time.process_time() - used
        memory["peak"] = {"whole_mib": memory_mib("VmHWM"), "anonymous_mib": sampler.peak}
        connection.send({"wall_s": wall, "cpu_s": cpu, "recalls": recalls, "memory": memory})


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Write the features, let the systems score them in turns, and set them side by side."""
    with tempfile.TemporaryDirectory(prefix="retrieval_") as name:
        folder = Path(name)
        texts, images, pairs = features(options)
        for file, array in zip(FEATURES, (texts, images, pairs), strict=True):
            np.save(folder / f"{file}.npy", array)
        write_features(folder / "images.jsonl", "image", images)
        for count in CN_CLIP_TEXTS:
            write_features(folder / f"{count}.jsonl", "text", texts[:count])
        runs = take_turns(folder, options)
    table: dict[str, Any] = {}
    for system, of_system in runs.items():
        timed = of_system[1:]
        table[system] = {
            key: statistics.median(run[key] for run in timed) for key in ("wall_s", "cpu_s")
        } | {
            "wall_s_all": [run["wall_s"] for run in timed],
            "memory": of_system[-1]["memory"],
            "recalls": of_system[0]["recalls"],
        }
    for system, base in BASE.items():
        if system in table:
            table[system]["times_faster"] = table[base]["wall_s"] / table[system]["wall_s"]
    peer = table["clip_benchmark"]["recalls"]
    table["largest_difference"] = max(
        abs(a - b)
        for system in BASE
        if system in table
        for a, b in zip(table[system]["recalls"], peer, strict=True)
    )
    return table


def take_turns(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return every round of every system; the first also imports and is not timed."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for system in TITLES:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, system, folder, options), daemon=True)
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
    return runs


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
    from vlm.evaluation.retrieval.comparison import compare
    from vlm.evaluation.retrieval.metrics import median_rank

    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
        )
    images, texts = (np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("images", "texts"))
    texts = texts[:queries]
    pairs = np.stack([np.arange(len(texts)), np.arange(len(texts)) % len(images)], axis=1)
    before = memory_mib("RssAnon")
    sampler = AnonymousMemory()
    sampler.start()
    started, used = time.perf_counter(), time.process_time()
    found = compare(
        texts, images, pairs, device="cpu", group=world_group(), show_progress_bar=rank == 0
    )
    record = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": time.process_time() - used,
        "own_mib": sampler.peak,
        "added_mib": sampler.peak - before,
        "median_rank": [median_rank(ranks) for ranks in found.ranks.values()],
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(record))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def markdown(results: dict[str, Any]) -> str:
    """Return the tables for people; ratios are to the peer of the row before."""
    lines = tables_of_systems(results["systems"]) if "systems" in results else []
    if "large" in results:
        row = results["large"]
        lines += [
            f"{row['images']:,} images x {row['queries']:,} of {row['texts']:,} texts x "
            f"{row['dim']}, {row['processes']} processes of one thread: {row['wall_s']:.0f} s, "
            f"{row['cpu_s']:.0f} CPU s, {row['own_memory_mib']:,.0f} MiB of own memory a process, "
            f"of which {row['added_mib']:,.0f} MiB added by ranking.",
        ]
    return "\n".join(lines)


def tables_of_systems(systems: dict[str, Any]) -> list[str]:
    """Return the lines of a table of times, and of one of memory."""
    times = ["| system | wall s | CPU s |", "| --- | ---: | ---: |"]
    memory = [
        "| MiB, own / whole | torch imported | before scoring | peak | added by scoring |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for system, title in TITLES.items():
        row, base = systems[system], systems.get(BASE.get(system, ""))
        wall = f"{row['wall_s']:.2f}"
        if base:
            wall += f" ({row['times_faster']:.1f} times faster)"
        times.append(f"| {title} | {wall} | {row['cpu_s']:.2f} |")
        cells = []
        for stage in STAGES:
            mine = stage_of(row["memory"], stage)
            cell = " / ".join(f"{mib:,.0f}" for mib in mine)
            if base and stage in ("peak", "added"):
                peers = stage_of(base["memory"], stage)
                ratios = [mib / peer for mib, peer in zip(mine, peers, strict=True)]
                cell += f" ({' / '.join(f'{ratio:.3f}x' for ratio in ratios)})"
            cells.append(cell)
        memory.append(f"| {title} | {' | '.join(cells)} |")
    return [*times, "", *memory]


def stage_of(memory: dict[str, dict[str, float]], stage: str) -> list[float]:
    """Return own and whole memory at a stage; `added` is the peak less what was there before."""
    kinds = ("anonymous_mib", "whole_mib")
    if stage == "added":
        return [memory["peak"][kind] - memory["before_scoring"][kind] for kind in kinds]
    return [memory[stage][kind] for kind in kinds]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25_010)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--signal", type=float, default=0.15, help="of its image in a caption")
    parser.add_argument("--threads", type=int, default=1, help="of each system")
    parser.add_argument("--mapped", action="store_true", help="every system maps the features")
    parser.add_argument(
        "--beside", type=Path, metavar="PATH", help="also time the vlm of this other checkout"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each system")
    parser.add_argument(
        "--large", type=int, nargs=3, metavar=("IMAGES", "TEXTS", "DIM"),
        help="instead: rank so many memory-mapped features, for example 100000 500000 512",
    )  # fmt: skip
    parser.add_argument("--queries", type=int, help="with --large: only the first texts")
    parser.add_argument("--processes", type=int, default=2, help="with --large")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    if options.beside:
        TITLES["other"] = OTHER
    threads = 1 if options.large else options.threads
    results = describe_setting("benchmarks/retrieval_eval.py", threads=threads)
    if options.large:
        results["large"] = large(options)
    else:
        results |= {key: getattr(options, key) for key in COMPARED}
        if options.beside:
            results["other_commit"] = subprocess.check_output(
                ["git", "rev-parse", "HEAD"], cwd=options.beside, text=True
            ).strip()
        results["malloc_mmap_threshold"] = os.environ.get("MALLOC_MMAP_THRESHOLD_")
        results["systems"] = compare(options)
    results["load_after"] = os.getloadavg()[0]
    leave(results, markdown(results), options.out)


if __name__ == "__main__":
    main()
