"""Rows of every rank of a group side by side, with and without their gradient."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from vlm.distributed.groups import RankGroup


def gather_rows(
    rows: Shaped[Tensor, "local ..."], group: RankGroup
) -> Shaped[Tensor, "gathered ..."]:
    """Concatenate the rows of every rank of the group, in rank order.

    The gradient of a row is the sum of its gradients on all ranks of the group: each rank's loss
    depends on every gathered row. Every rank must bring the same number of rows.
    """
    if group.size == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, group)
    return gathered


def sum_over(values: Shaped[Tensor, "*shape"], group: RankGroup) -> Shaped[Tensor, "*shape"]:
    """Add up a tensor over the ranks of the group; its gradient is added up in the same way."""
    if group.size == 1:
        return values
    total: Tensor = _SumOver.apply(values, group)
    return total


class _GatherRows(torch.autograd.Function):
    """All-gather forward, reduce-scatter backward.

    The list forms of the collectives are used because the tensor forms change their names
    between torch releases.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(group.size)]
        dist.all_gather(parts, rows.contiguous(), group=group.process_group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        group: RankGroup = ctx.group
        parts = [part.contiguous() for part in gradients[0].chunk(group.size)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=group.process_group)
        return own, None


class _SumOver(torch.autograd.Function):
    """All-reduce forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group.process_group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group.process_group)
        return total, None
