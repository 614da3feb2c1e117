"""Measure the contrastive losses beside open_clip's: time, CPU, memory, bytes sent, gradients.

Spawns a world of processes (gloo on the CPU; one process on `--device cuda`) and runs every
system in it, one after the other, round by round. One JSON object goes to stdout, a Markdown
table to stderr; `benchmarks/README.md` says what is counted and how.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from meters import TensorMeter
from setting import describe_setting, leave
from torch import Tensor

from vlm.losses.contrastive import ContrastiveLoss
from vlm.losses.plan import LossPlan

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def peer_softmax(**options: bool) -> Callable[[], Loss]:
    """Return a maker of open_clip's `ClipLoss`."""

    def make() -> Loss:
        from open_clip import ClipLoss

        loss = ClipLoss(rank=_rank(), world_size=_world(), cache_labels=True, **options)
        return lambda image, text, scale, bias: loss(image, text, scale)

    return make


def peer_sigmoid() -> Loss:
    """Return open_clip's `SigLipLoss`, with its default exchange between neighbours."""
    from open_clip.loss import SigLipLoss

    loss: Loss = SigLipLoss(rank=_rank(), world_size=_world())
    return loss


def ours(**plan: Any) -> Callable[[], Loss]:
    """Return a maker of our loss under a plan."""

    def make() -> Loss:
        loss = ContrastiveLoss(LossPlan(**plan))
        if plan.get("kind") == "sigmoid":
            return lambda image, text, scale, bias: loss(image, text, scale, bias).loss
        return lambda image, text, scale, bias: loss(image, text, scale).loss

    return make


SYSTEMS: dict[str, tuple[str, Callable[[], Loss]]] = {
    "clip": ("softmax", peer_softmax()),
    "clip-local": ("softmax", peer_softmax(local_loss=True, gather_with_grad=True)),
    "vlm-exact": ("softmax", ours()),
    "vlm-groups": ("softmax", ours(group_size=2)),
    "siglip": ("sigmoid", peer_sigmoid),
    "vlm-sigmoid": ("sigmoid", ours(kind="sigmoid")),
}
TITLES = {
    "clip": "open_clip `ClipLoss`, default",
    "clip-local": "open_clip `ClipLoss`, local_loss, gather_with_grad",
    "vlm-exact": "vlm, exact",
    "vlm-groups": "vlm, groups of 2",
    "siglip": "open_clip `SigLipLoss`",
    "vlm-sigmoid": "vlm, sigmoid",
}
BASE = {"softmax": "clip-local", "sigmoid": "siglip"}
MOST_BYTES = 4 * 2**30
"""Of similarities on a rank; open_clip's default loss is left out where it would need more."""


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def inputs(
    rows: int, dim: int, device: str, dtype: torch.dtype, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random unit vectors of this rank, and a scale and bias as the kind starts with."""
    generator = torch.Generator().manual_seed(_rank())
    image, text = (
        F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(device, dtype)
        for _ in range(2)
    )
    scale, bias = (20.0, 0.0) if kind == "softmax" else (10.0, -10.0)
    scalars = [torch.tensor(value, device=device) for value in (scale, bias)]
    leaves = [each.requires_grad_() for each in (image, text, *scalars)]
    return leaves[0], leaves[1], leaves[2], leaves[3]


def step(loss: Loss, leaves: Sequence[Tensor]) -> float:
    """Run forward and backward once and return the loss."""
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves)
    value.backward()
    return value.item()


def timed_step(loss: Loss, leaves: Sequence[Tensor]) -> tuple[float, float]:
    """Return wall and CPU seconds of one step; ranks begin and end together."""
    cuda = leaves[0].is_cuda
    _wait(cuda)
    started, used = time.perf_counter(), time.process_time()
    step(loss, leaves)
    _wait(cuda)
    return time.perf_counter() - started, time.process_time() - used


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def account(loss: Loss, leaves: Sequence[Tensor]) -> dict[str, Any]:
    """Return the peak memory of one step, features included, and what it sends."""
    for leaf in leaves:
        leaf.grad = None
    if leaves[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        step(loss, leaves)
        return {"peak": torch.cuda.max_memory_allocated(), "sent": 0}
    with TensorMeter(*leaves) as meter:
        step(loss, leaves)
    return {"peak": meter.peak, "sent": meter.bytes_sent, "collectives": meter.collectives}


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure the systems on this rank, taking turns, so that noise meets all of them."""
    dtype = getattr(torch, options.dtype)
    results: dict[str, dict[str, Any]] = {}
    losses = {name: SYSTEMS[name][1]() for name in options.systems}
    for name, loss in losses.items():
        leaves = inputs(options.rows, options.dim, options.device, dtype, SYSTEMS[name][0])
        results[name] = account(loss, leaves) | {"wall": [], "cpu": []}
    for _ in range(options.repeats):
        for name, loss in losses.items():
            leaves = inputs(options.rows, options.dim, options.device, dtype, SYSTEMS[name][0])
            wall, cpu = timed_step(loss, leaves)
            results[name]["wall"].append(wall)
            results[name]["cpu"].append(cpu)
    if options.device == "cpu":
        for name in options.systems:
            results[name] |= audit(name)
    return results


def audit(name: str, rows: int = 6, dim: int = 8) -> dict[str, float]:
    """Return by what factor averaged gradients differ from the true one of the exact loss.

    The truth is one process's float64 loss on all ranks' samples (for groups: the mean of the
    groups'). Factors are least-squares ones; 1 is right.
    """
    kind, make = SYSTEMS[name]
    loss = make()
    leaves = inputs(rows, dim, "cpu", torch.float64, kind)
    leaves = (*leaves[:2], *(leaf.detach().double().requires_grad_() for leaf in leaves[2:]))
    step(loss, leaves)
    world, groups = _world(), _world() // 2 if name == "vlm-groups" else 1
    gathered = []
    for leaf in leaves[:2]:
        parts = [torch.empty_like(leaf) for _ in range(world)]
        if world > 1:
            dist.all_gather(parts, leaf.detach())
        else:
            parts = [leaf.detach()]
        gathered.append(torch.cat(parts).requires_grad_())
    scale, bias = (leaf.detach().clone().requires_grad_() for leaf in leaves[2:])
    truth = torch.stack(
        [
            _definition(image, text, scale, bias, kind)
            for image, text in zip(*(each.chunk(groups) for each in gathered), strict=True)
        ]
    ).mean()
    truth.backward()
    own = slice(_rank() * rows, (_rank() + 1) * rows)
    found = torch.cat([leaf.grad for leaf in leaves[:2]]) / world
    true = torch.cat([each.grad[own] for each in gathered])
    factor = (found * true).sum() / (true * true).sum()
    residual = (found - factor * true).norm() / (factor * true).norm()
    scale_gradient = leaves[2].grad.clone()
    if world > 1:
        dist.all_reduce(scale_gradient)
    return {
        "feature_gradient_factor": factor.item(),
        "residual": residual.item(),
        "scale_gradient_factor": (scale_gradient / world / scale.grad).item(),
    }


def _definition(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, kind: str) -> Tensor:
    logits = scale * image @ text.T
    if kind == "softmax":
        own = torch.arange(len(logits))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * (logits + bias)).sum() / len(logits)


def run_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    """Measure every system on one rank and write what was found."""
    torch.set_num_threads(1)
    if options.processes > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.processes
        )
    results = measure(options)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    if options.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def summarise(ranks: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Put the ranks' measurements together: slowest wall, sum of CPU, largest memory."""
    table: dict[str, Any] = {}
    for name in options.systems:
        own = [rank[name] for rank in ranks]
        rounds = range(options.repeats)
        table[name] = {
            "wall_ms": 1e3 * statistics.median(max(r["wall"][k] for r in own) for k in rounds),
            "cpu_ms": 1e3 * statistics.median(sum(r["cpu"][k] for r in own) for k in rounds),
            "peak_mib": max(r["peak"] for r in own) / 2**20,
            "sent_mib": max(r["sent"] for r in own) / 2**20,
        } | {
            key: own[0][key]
            for key in ("collectives", *(k for k in own[0] if "factor" in k or k == "residual"))
            if key in own[0]
        }
        base = table.get(BASE[SYSTEMS[name][0]])
        if base:
            table[name]["ratio"] = {
                key: table[name][key] / base[key]
                for key in ("wall_ms", "cpu_ms", "peak_mib", "sent_mib")
                if base[key]
            }
    return table


def markdown(table: dict[str, Any]) -> str:
    """Return the table for people; ratios are to open_clip's loss of the same kind."""
    lines = [
        "| loss | wall ms | CPU ms, all ranks | peak MiB a rank | sent MiB a rank "
        "| features' gradient | scale's gradient |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in table.items():
        ratio = row.get("ratio", {})
        cells = [
            f"{row[key]:,.1f} ({ratio[key]:.3f}x)" if key in ratio else f"{row[key]:,.1f}"
            for key in ("wall_ms", "cpu_ms", "peak_mib", "sent_mib")
        ]
        cells += [
            f"{row[key]:.3f}x" if key in row else ""
            for key in ("feature_gradient_factor", "scale_gradient_factor")
        ]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4096, help="samples a rank")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each system")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the features")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), help="default: all that fit")
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    if options.device == "cuda":
        options.processes = 1
    if options.systems is None:
        fits = 16 * (options.processes * options.rows) ** 2 < MOST_BYTES
        left_out = {"clip"} if not fits else set()
        left_out |= {"vlm-groups"} if options.processes % 2 else set()
        options.systems = [name for name in SYSTEMS if name not in left_out]
    setting = describe_setting("benchmarks/loss.py", threads=1)
    with tempfile.TemporaryDirectory(prefix="loss_") as folder:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=run_rank, args=(rank, options, folder))
            for rank in range(options.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit(f"exit codes {[worker.exitcode for worker in workers]}")
        ranks = [
            json.loads((Path(folder) / f"{rank}.json").read_text())
            for rank in range(options.processes)
        ]
    shape = {key: getattr(options, key) for key in ("processes", "rows", "dim", "dtype", "device")}
    table = summarise(ranks, options)
    leave(setting | shape | {"losses": table}, markdown(table), options.out)


if __name__ == "__main__":
    main()
