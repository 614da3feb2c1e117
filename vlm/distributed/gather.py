"""Gathered rows and sums over the ranks of a group, with their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from vlm.distributed.groups import RankGroup


def gather_numbers(
    numbers: Sequence[int], group: RankGroup, device: torch.device
) -> list[list[int]]:
    """Return every rank's integers in rank order; as many from each."""
    if group.size == 1:
        return [list(numbers)]
    # On the device, because NCCL sends nothing else; tolist() waits for it and for all ranks.
    own = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    gathered = own.new_empty(group.size, len(numbers))
    dist.all_gather_single(gathered, own[None], group=group.process_group)
    rows: list[list[int]] = gathered.tolist()
    return rows


def gather_rows(
    rows: Shaped[Tensor, "local ..."], group: RankGroup, sizes: Sequence[int]
) -> Shaped[Tensor, "gathered ..."]:
    """Concatenate the rows of every rank, `sizes` of them, in rank order, without a gradient."""
    if group.size == 1 or max(sizes) == 0:
        return rows
    # One buffer of the longest from each: a single collective takes equal sizes only.
    gathered = rows.new_empty(group.size * max(sizes), *rows.shape[1:])
    dist.all_gather_single(gathered, _padded(rows, sizes), group=group.process_group)
    return _trimmed(gathered, sizes)


@dataclass(frozen=True, slots=True)
class SentRows:
    """Rows on their way to every rank of a group; `receive` waits for them.

    Between `send_rows` and `receive` other work can run. In the backward pass the order is
    reversed: the gradients are on their way home while whatever was computed in between is
    differentiated.
    """

    own: Float[Tensor, "local dim"]
    transfer: "_Transfer"

    def receive(self) -> Float[Tensor, "gathered dim"]:
        """Wait for the rows of every rank, in rank order.

        The gradient of a row is the sum of its gradients on all ranks of the group: the loss of
        each rank depends on every gathered row. Where the rows need no gradient, nothing is sent
        in the backward pass.
        """
        if not self.transfer.travels:
            # Rounded as if it travelled, so that a group of one learns the same.
            return self.own.to(self.transfer.wire_dtype).to(self.transfer.dtype)
        received: Tensor = _Receive.apply(self.own, self.transfer)
        return received


def send_rows(
    rows: Float[Tensor, "local dim"],
    group: RankGroup,
    sizes: Sequence[int],
    *,
    dtype: torch.dtype,
    wire_dtype: torch.dtype,
    gradient_wire_dtype: torch.dtype,
    overlap: bool = True,
) -> SentRows:
    """Start to send this rank's rows to every rank of the group; all ranks must call this.

    Args:
        rows: This rank's.
        group: The ranks to exchange rows with.
        sizes: How many rows each of them has.
        dtype: In which the rows are received.
        wire_dtype: To which the rows are rounded, whether or not they travel.
        gradient_wire_dtype: To which gradients are rounded before they travel.
        overlap: Whether to return, here and in the backward pass, while rows are on their way.
    """
    transfer = _Transfer(group, tuple(sizes), dtype, wire_dtype, gradient_wire_dtype, overlap)
    own: Tensor = _Send.apply(rows, transfer) if transfer.travels else rows
    return SentRows(own, transfer)


@dataclass(slots=True)
class _Transfer:
    """What is under way between the forward and the backward halves of one exchange."""

    group: RankGroup
    sizes: tuple[int, ...]
    dtype: torch.dtype
    wire_dtype: torch.dtype
    gradient_wire_dtype: torch.dtype
    overlap: bool
    work: dist.Work | None = None
    arriving: Tensor | None = None
    leaving: Tensor | None = None

    @property
    def travels(self) -> bool:
        """Whether there is anyone to send to, and anything to send."""
        return self.group.size > 1 and max(self.sizes) > 0

    def start(self, work: dist.Work | None, arriving: Tensor, leaving: Tensor) -> None:
        assert work is not None  # as it is for a member of the group
        # The communicator reads and writes both until the exchange is over: keep them alive.
        self.work, self.arriving, self.leaving = work, arriving, leaving
        if not self.overlap:
            work.wait()

    def finish(self) -> Tensor:
        assert self.work is not None
        assert self.arriving is not None
        # On CUDA only the current stream waits, not the host.
        self.work.wait()
        arrived = self.arriving
        self.work = self.arriving = self.leaving = None
        return arrived


class _Send(torch.autograd.Function):
    """Post the all-gather forward; wait for the reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer, ctx.dtype = transfer, rows.dtype
        group = transfer.group
        leaving = _padded(rows.to(transfer.wire_dtype), transfer.sizes)
        arriving = leaving.new_empty(group.size * len(leaving), *rows.shape[1:])
        work = dist.all_gather_single(arriving, leaving, group=group.process_group, async_op=True)
        transfer.start(work, arriving, leaving)
        # The rows are unchanged; the view gives autograd a node whose backward pass waits.
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        transfer: _Transfer = ctx.transfer
        # What came through autograd is a placeholder: see _Receive.
        arrived = transfer.finish()[: transfer.sizes[transfer.group.rank]]
        return arrived.to(ctx.dtype), None


class _Receive(torch.autograd.Function):
    """Wait for the all-gather forward; post the reduce-scatter backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer, ctx.own = transfer, (own.shape, own.dtype)
        return _trimmed(transfer.finish(), transfer.sizes).to(transfer.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        transfer: _Transfer = ctx.transfer
        shape, dtype = ctx.own
        group = transfer.group
        leaving = gradients[0].to(transfer.gradient_wire_dtype).contiguous()
        if len(set(transfer.sizes)) > 1:
            # Uneven rows are padded once more: the parts of a reduce-scatter are of one size.
            parts = torch.split(leaving, list(transfer.sizes))
            leaving = torch.cat([_padded(part, transfer.sizes) for part in parts])
        arriving = leaving.new_empty(max(transfer.sizes), *shape[1:])
        work = dist.reduce_scatter_single(
            arriving, leaving, group=group.process_group, async_op=True
        )
        transfer.start(work, arriving, leaving)
        # The gradient itself is still on its way, and autograd wants something of its shape: one
        # zero, expanded, costs no memory. _Send.backward puts what arrived in its place.
        return gradients[0].new_zeros((), dtype=dtype).expand(shape), None


def _padded(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Append zeros up to the longest rank's rows."""
    missing = max(sizes) - len(rows)
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.contiguous()


def _trimmed(gathered: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cut the padding off again."""
    longest = max(sizes)
    if min(sizes) == longest:
        return gathered
    parts = torch.split(gathered, longest)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def sum_over(values: Shaped[Tensor, "*shape"], group: RankGroup) -> Shaped[Tensor, "*shape"]:
    """Add up a tensor over the ranks of the group, and its gradient as well."""
    if group.size == 1:
        return values
    total: Tensor = _SumOver.apply(values, group)
    return total


class _SumOver(torch.autograd.Function):
    """All-reduce forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        total = values.clone()  # all_reduce works in place
        dist.all_reduce(total, group=group.process_group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss depends on the sum, so a value's gradient is the sum of all ranks'.
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group.process_group)
        return total, None
