"""Count what a contrastive loss costs a rank at scale, by formulas that real processes check.

The formulas give candidates, FLOPs, memory, bytes sent and collectives of one step, forward and
backward, for worlds that no test machine has. The same formulas are then held against worlds that
it does have: gloo processes with tiny features, in which every plan's candidates, FLOPs, bytes
and collectives are counted. One JSON object goes to stdout, Markdown tables to stderr; the exit
code is 1 where a count differs from its formula.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from meters import TensorMeter
from setting import describe_setting, leave
from torch import Tensor

from vlm.distributed.mesh import mesh_shape
from vlm.losses import costs
from vlm.losses.contrastive import ContrastiveLoss, PairIds
from vlm.losses.plan import LossPlan

NODE = 8  # ranks of a machine in the large worlds
CHECKED_ROWS, CHECKED_DIM = 8, 16
# The largest world in which to check open_clip's loss, which takes each process seconds to import.
OPEN_CLIP_WORLD = 4
# As the dispatcher names them.
COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


class Batch(costs.Sizes):
    """The sizes of a step of one term."""

    @property
    def block(self) -> int:
        """Similarities of one rank's images with all ranks' texts."""
        return self.rows * self.rows * self.world

    @property
    def unit(self) -> int:
        """U: the FLOPs of computing them once."""
        return 2 * self.block * self.dim


@dataclass(frozen=True)
class Cost:
    """What one step costs a rank, forward and backward."""

    candidates: int
    """Texts that an image is compared with."""
    units: float
    """FLOPs of matrix products, in U."""
    feature_bytes: int
    """Features that were gathered, with its own, and their gradients."""
    similarity_bytes: int
    """Similarities, and what is derived from them pair by pair, held at a time; about."""
    sent: int
    """Bytes, by bandwidth-optimal collectives."""
    collectives: dict[str, int]


def open_clip_cost(batch: Batch, *, local: bool) -> Cost:
    """Return the cost of open_clip's `ClipLoss`, on NCCL.

    Args:
        batch: The sizes of the step.
        local: With `local_loss` and `gather_with_grad`; else as it is by default.
    """
    directions = 2 if local else 1
    pairs = batch.block if local else batch.block * batch.world
    travelled = 2 * (batch.world - 1) * batch.features * costs.FLOAT
    return Cost(
        candidates=batch.world * batch.rows,
        units=3 * directions if local else 3 * batch.world,
        feature_bytes=4 * batch.world * batch.features * costs.FLOAT,
        # Logits, log-softmaxes and gradients: `TensorMeter` finds four float32 a pair at the peak.
        similarity_bytes=4 * costs.FLOAT * pairs,
        sent=directions * travelled,
        collectives={"all-gather": 2} | ({"reduce-scatter": 2} if local else {}),
    )


def plan_cost(plan: LossPlan, batch: Batch, *, node: int | None = None, ids: bool = False) -> Cost:
    """Return the cost of `ContrastiveLoss` under a plan, for float32 features.

    Args:
        plan: Who contrasts with whom, and how.
        batch: The sizes of the step.
        node: Ranks of a machine, by which `auto` chooses a mesh; None is all of them.
        ids: Whether pairs match by ids.
    """
    group = plan.group_size or batch.world
    rows, columns = mesh_shape(plan.mesh, range(group), node or batch.world)
    block = group * batch.rows**2 * costs.FLOAT
    tile_rows, tile_columns = plan.tile_shape("cuda")
    tile = min(block, tile_rows * tile_columns * costs.FLOAT)
    kept = 0 if plan.kind == "sigmoid" else int(min(block, plan.kept_bytes))
    again = plan.kind == "softmax" and kept < block
    tiles = 3 if plan.kind == "sigmoid" else 1 + again
    sent = list(messages(plan, batch, (rows, columns), ids=ids))
    return Cost(
        candidates=group * batch.rows,
        units=(3 + again) * group / batch.world,
        feature_bytes=2 * (rows + columns) * batch.features * costs.FLOAT,
        similarity_bytes=kept + tiles * tile,
        sent=sum(size for _, size in sent),
        collectives=dict(Counter(kind for kind, _ in sent)),
    )


def messages(
    plan: LossPlan, batch: Batch, mesh: tuple[int, int], *, ids: bool
) -> Iterator[costs.Message]:
    """Give the collectives of a step of one term, and the bytes that a rank sends in each."""
    yield from costs.declaration(plan, batch, mesh)
    # Texts travel along columns, of as many ranks as the mesh has rows; images along rows.
    for ranks in mesh:
        yield from costs.travel(plan, ranks, batch.features)
        if ids:  # of the sample, the image and the caption
            yield from costs.gather(ranks, batch.rows * 3 * costs.INTEGER)
        yield from costs.merges(ranks, batch.rows, *costs.statistics_kept(plan, ids=ids))


def cost_of_losses(batch: Batch) -> dict[str, Cost]:
    """Return what each loss that such a world can have costs."""
    exact = partial(plan_cost, batch=batch)
    table = {
        "open_clip, local_loss, gather_with_grad": open_clip_cost(batch, local=True),
        "open_clip, default": open_clip_cost(batch, local=False),
        "exact, one-sided (text) mesh": exact(LossPlan(mesh="text")),
        "exact, squarest mesh": exact(LossPlan()),
    }
    if batch.world > NODE and batch.world % NODE == 0:
        rows = batch.world // NODE
        table[f"exact, {rows} nodes x {NODE}"] = exact(LossPlan(), node=NODE)
    for group in (8, 32):
        if batch.world > group and batch.world % group == 0:
            table[f"groups of {group}"] = exact(LossPlan(group_size=group), node=NODE)
    table["sigmoid, squarest mesh"] = exact(LossPlan(kind="sigmoid"))
    return table


class StepMeter(TensorMeter):
    """Counts the FLOPs of matrix products as well."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it if it is a matrix product."""
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[:2] if name == "mm" else args[1:3]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return super().__torch_dispatch__(func, types, args, kwargs)


def checked_plans(world: int) -> Iterator[tuple[str, LossPlan, bool]]:
    """Give every group size on every mesh, and what else changes a count: name, plan, ids."""
    for group in (g for g in range(1, world + 1) if world % g == 0):
        for rows in (r for r in range(1, group + 1) if group % r == 0):
            mesh = (rows, group // rows)
            place = f"groups of {group} on {mesh[0]} x {mesh[1]}"
            yield f"softmax, {place}", LossPlan(group_size=group, mesh=mesh), False
            plan = LossPlan(kind="sigmoid", group_size=group, mesh=mesh)
            yield f"sigmoid, {place}", plan, False
    yield "nothing kept", LossPlan(keep_logits=False), False
    yield "label smoothing", LossPlan(label_smoothing=0.1), False
    yield "uneven allowed", LossPlan(group_size=1, even=False), False
    yield "ids", LossPlan(), True
    yield "sigmoid, ids", LossPlan(kind="sigmoid"), True
    yield "ids, ignored, smoothing", LossPlan(duplicates="ignore", label_smoothing=0.1), True
    half = LossPlan(wire_dtype="bfloat16", gradient_wire_dtype="bfloat16")
    yield "bfloat16 on the wire", half, False


def check_world(rank: int, world: int, folder: str) -> None:
    """Count on one rank what every plan does, and write it beside what the formulas say."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    batch = Batch(world, CHECKED_ROWS, CHECKED_DIM)
    results: dict[str, dict[str, Any]] = {}
    for name, plan, ids in checked_plans(world):
        formula = asdict(plan_cost(plan, batch, ids=ids))
        measured = count_plan(plan, batch, ids=ids)
        results[name] = {"formula": {key: formula[key] for key in measured}, "measured": measured}
    if world <= OPEN_CLIP_WORLD:
        results |= check_open_clip(batch)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def check_open_clip(batch: Batch) -> dict[str, dict[str, Any]]:
    """Count what open_clip's loss does on this rank, beside what the formulas say."""
    from open_clip import ClipLoss

    results = {}
    for name, local in (("local_loss, gather_with_grad", True), ("default", False)):
        loss = ClipLoss(
            local_loss=local,
            gather_with_grad=local,
            rank=dist.get_rank(),
            world_size=batch.world,
        )
        formula, counts = asdict(open_clip_cost(batch, local=local)), count(loss, batch)
        # Not the collectives: on gloo torch's gather scatters its gradients rank by rank.
        measured = {key: counts[key] for key in ("units", "sent")}
        results[f"open_clip, {name}"] = {
            "formula": {key: formula[key] for key in measured},
            "measured": measured,
        }
    return results


def count_plan(plan: LossPlan, batch: Batch, *, ids: bool) -> dict[str, Any]:
    """Return what one step of our loss did."""
    loss = ContrastiveLoss(plan)
    seen = []
    own = torch.arange(batch.rows) + dist.get_rank() * batch.rows
    pairs = PairIds(own, own) if ids else None

    def run(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        bias = torch.tensor(-10.0, requires_grad=True) if plan.kind == "sigmoid" else None
        output = loss(image, text, scale, bias, pairs)
        seen.append(output.candidates)
        return output.loss

    counts = count(run, batch)
    return {"candidates": seen[0]} | counts


def count(loss: Any, batch: Batch) -> dict[str, Any]:
    """Return FLOPs, bytes and collectives of one step of a loss."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    image, text = (
        F.normalize(torch.randn(batch.rows, batch.dim, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(20.0, requires_grad=True)
    with StepMeter() as meter:
        loss(image, text, scale).backward()
    return {
        "units": meter.flops / batch.unit,
        "sent": meter.bytes_sent,
        "collectives": {COLLECTIVES.get(k, k): n for k, n in meter.collectives.items()},
    }


def check(world: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return what the first rank of a world counted, and on any rank what differed."""
    with tempfile.TemporaryDirectory(prefix="loss_scaling_") as folder:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=check_world, args=(rank, world, folder)) for rank in range(world)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit(f"exit codes {[worker.exitcode for worker in workers]}")
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    differences = [
        f"{world} ranks, rank {rank}, {name}: {result['measured']} for {result['formula']}"
        for rank, results in enumerate(ranks)
        for name, result in results.items()
        if result["measured"] != result["formula"]
    ]
    return ranks[0], differences


def cost_table(batch: Batch, table: Mapping[str, Cost]) -> str:
    """Return the costs in one world as Markdown."""
    lines = [
        f"{batch.world} ranks, {batch.rows} x {batch.dim} float32 features each, "
        f"U = {batch.unit / 1e9:,.1f} GFLOP:",
        "",
        "| loss | candidates | FLOPs, U | features, MiB | similarities, MiB | sent, MiB "
        "| collectives |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, cost in table.items():
        units = f"{cost.units:.3g}" if cost.units < 1000 else f"{cost.units:,.0f}"
        sizes = (cost.feature_bytes, cost.similarity_bytes, cost.sent)
        mebibytes = " | ".join(f"{size / 2**20:,.1f}" for size in sizes)
        number = sum(cost.collectives.values())
        lines.append(f"| {name} | {cost.candidates:,} | {units} | {mebibytes} | {number} |")
    return "\n".join(lines) + "\n"


def check_table(checks: Mapping[int, Mapping[str, Any]]) -> str:
    """Return how many counts agreed with their formulas, as Markdown."""
    lines = ["| processes | losses checked | counts that differ |", "| ---: | ---: | ---: |"]
    lines += [
        f"| {world} | {len(each['losses'])} | {len(each['differences'])} |"
        for world, each in checks.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the costs, check the formulas, and say whether they hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="samples a rank")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64, 256, 1024, 4096])
    parser.add_argument(
        "--worlds", type=int, nargs="*", default=[2, 4, 6, 9, 16], help="processes of the checks"
    )
    parser.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options = parser.parse_args()
    setting = describe_setting("benchmarks/loss_scaling.py", threads=1)
    formulas = {}
    for ranks in options.ranks:
        batch = Batch(ranks, options.rows, options.dim)
        table = cost_of_losses(batch)
        formulas[ranks] = {name: asdict(cost) for name, cost in table.items()}
        print(cost_table(batch, table), file=sys.stderr)
    checks = {}
    for world in options.worlds:
        losses, differences = check(world)
        checks[world] = {"losses": losses, "differences": differences}
        for difference in differences:
            print(difference, file=sys.stderr)
    found = {"rows": options.rows, "dim": options.dim, "formulas": formulas, "checks": checks}
    leave(setting | found, check_table(checks), options.out)
    if any(each["differences"] for each in checks.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
