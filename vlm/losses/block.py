"""A rank's block of similarities, and what is known of its rows and columns tile by tile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.distributed.groups import RankGroup
from vlm.distributed.mesh import RankMesh
from vlm.losses.kernels import scaled_product
from vlm.losses.matches import OwnPairs, SharedIds, Tile

# Up to this many ranks one all-gather of the statistics costs less than two all-reduces.
_FEW_RANKS = 4


@dataclass(frozen=True, slots=True)
class AxisLayout:
    """The rows, or the columns, of a rank's block."""

    own: slice
    """This rank's samples among them."""
    scored: int
    """How many of them, from the first, have a loss; the others are candidates only."""
    total: int
    """How many in the whole group have a loss."""
    candidates: int
    """How many there are in the whole group."""


@dataclass(frozen=True, slots=True)
class Block:
    """All that computing a rank's block needs besides features, scale and bias."""

    mesh: RankMesh
    rows: AxisLayout
    columns: AxisLayout
    matches: OwnPairs | SharedIds
    tile: tuple[int, int]
    kept_bytes: float
    label_smoothing: float
    product_dtype: torch.dtype
    """In which features are multiplied; sums are in the features' own type."""

    @property
    def group_size(self) -> int:
        """Ranks that contrast with each other."""
        return self.mesh.rows * self.mesh.columns


class RowStatistics(NamedTuple):
    """What is known of this rank's images against texts, or of its texts against images."""

    loss: Float[Tensor, " local"]
    """Each row's loss, in nats."""
    positive_logit: Float[Tensor, " local"]
    """Mean of the logits of its positives."""
    log_sum_exp: Float[Tensor, " local"] | None
    """Of its candidates' logits; None for a sigmoid loss."""
    correct: Bool[Tensor, " local"]
    """Whether no candidate is more similar than its most similar positive."""


class TileBuffer:
    """Memory for one tile of similarities and one to work in, used again for the next.

    On a CPU fresh memory costs more than most of what is done with it.
    """

    def __init__(self, like: Tensor) -> None:
        self._memory, self._scratch = like.new_empty(0), like.new_empty(0)

    def similarities(
        self,
        rows: Float[Tensor, "rows dim"],
        columns: Float[Tensor, "columns dim"],
        scale: float,
        dtype: torch.dtype,
    ) -> Float[Tensor, "rows columns"]:
        """Return all inner products times `scale`, multiplied in `dtype`, until the next call."""
        size = len(rows) * len(columns)
        if len(self._memory) < size:
            self._memory = self._memory.new_empty(size)
        out = self._memory[:size].view(len(rows), len(columns))
        return scaled_product(rows, columns, scale, out, dtype)

    def scratch(self, tile: Tensor) -> Tensor | None:
        """Return memory of the tile's size; None on a GPU, where kernels bring their own."""
        if tile.is_cuda:
            return None
        if len(self._scratch) < tile.numel():
            self._scratch = self._scratch.new_empty(tile.numel())
        return self._scratch[: tile.numel()].view_as(tile)

    def give_away(self) -> None:
        """Leave the memory to whoever keeps the last tile."""
        self._memory = self._memory.new_empty(0)


class AxisStatistics:
    """Running statistics of the rows, or of the columns, that have a loss.

    The sum of exponentials is relative to the running maximum, never to a fixed one, so that
    logits of any size stay finite.

    Args:
        layout: Of the rows or columns.
        opposite: Of what they are compared with.
        block: To which both belong.
        like: A tensor of the type and on the device of the statistics.
        sums: Names of statistics that add up beside those of positives; `exp_sum` comes first.
    """

    max: Tensor
    exp_sum: Tensor
    loss_sum: Tensor
    logit_sum: Tensor
    ignored: Tensor
    positive_max: Tensor
    positive_sum: Tensor
    positive_count: Tensor

    def __init__(
        self,
        layout: AxisLayout,
        opposite: AxisLayout,
        block: Block,
        like: Tensor,
        sums: Sequence[str],
    ) -> None:
        self.layout, self.opposite, self.matches = layout, opposite, block.matches
        maxima = ["max"]
        if isinstance(block.matches, OwnPairs):
            # They lie in the block of the rank that asks for them.
            self.positive_sum = like.new_zeros(layout.scored)
        else:
            maxima.append("positive_max")
            sums = [*sums, "positive_sum", "positive_count"]
            if block.matches.duplicates == "ignore":
                sums.append("ignored")
        self._maxima, self._sums = maxima, list(sums)
        self._hold(
            like.new_full((len(maxima), layout.scored), torch.finfo(like.dtype).min),
            like.new_zeros(len(sums), layout.scored),
        )

    def _hold(self, maxima: Tensor, sums: Tensor) -> None:
        self._max_table, self._sum_table = maxima, sums
        for name, row in zip(self._maxima + self._sums, (*maxima, *sums), strict=True):
            setattr(self, name, row)

    def add(self, span: slice, maximum: Tensor, exp_sum: Tensor) -> None:
        """Take in the maxima and the sums of exponentials relative to them of one tile."""
        before = self.max[span]
        after = torch.maximum(before, maximum)
        self.exp_sum[span].mul_((before - after).exp_()).add_(exp_sum * (maximum - after).exp_())
        before.copy_(after)

    def add_losses(self, span: slice, maximum: Tensor, losses: Tensor) -> None:
        """Take in the maxima and the summed losses of one tile."""
        self.max[span] = torch.maximum(self.max[span], maximum)
        self.loss_sum[span] += losses

    def merge(self, group: RankGroup) -> None:
        """Merge what the ranks of a mesh row, or column, know of the same samples.

        Few ranks send everything to each other at once; many take the maximum first and add up
        sums relative to it. The result is the same on every rank, to the bit.
        """
        if group.size == 1 or not self.layout.scored:
            return
        number = len(self._maxima)
        if group.size <= _FEW_RANKS:
            own = torch.cat([self._max_table, self._sum_table])
            parts = own.new_empty(group.size, *own.shape)
            dist.all_gather_single(parts, own[None], group=group.process_group)
            maxima = parts[:, :number].amax(0)
            sums = self._relative(parts[:, number:], parts[:, 0], maxima[0]).sum(0)
        else:
            maxima = self._max_table.clone()
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group.process_group)
            sums = self._relative(self._sum_table, self.max, maxima[0])
            dist.all_reduce(sums, group=group.process_group)
        self._hold(maxima, sums)

    def _relative(self, sums: Tensor, maximum: Tensor, highest: Tensor) -> Tensor:
        """Make sums of exponentials relative to the highest maximum of all ranks."""
        if self._sums[0] == "exp_sum":
            sums[..., 0, :] *= (maximum - highest).exp_()
        return sums

    @property
    def log_sum_exp(self) -> Float[Tensor, " scored"]:
        """Of all candidates' logits."""
        return self.max + self.exp_sum.log()

    @property
    def candidates(self) -> Float[Tensor, " scored"] | int:
        """How many candidates each has in the whole group."""
        ignored: Tensor | int = getattr(self, "ignored", 0)
        return self.opposite.candidates - ignored

    @property
    def positives(self) -> Float[Tensor, " scored"] | int:
        """How many positives each has in the whole group."""
        return 1 if isinstance(self.matches, OwnPairs) else self.positive_count

    def own_positives(self) -> tuple[Float[Tensor, " local"], Bool[Tensor, " local"]]:
        """Return each own sample's mean positive logit, and whether a positive is its best."""
        own = self.layout.own
        total = self.positive_sum[own]
        if isinstance(self.matches, OwnPairs):
            return total, total >= self.max[own]
        count = self.positive_count[own]
        correct = (count > 0) & (self.positive_max[own] >= self.max[own])
        return total / count.clamp(min=1), correct


def read_matches(
    matches: OwnPairs | SharedIds,
    logits: Float[Tensor, "rows columns"],
    tile: Tile,
    rows: AxisStatistics,
    columns: AxisStatistics,
    bias: Float[Tensor, ""] | None = None,
) -> Bool[Tensor, "rows columns"] | None:
    """Add a tile's positive pairs to the statistics.

    Args:
        matches: Which they are.
        logits: The tile, without its bias.
        tile: Where it lies.
        rows: Statistics of the block's rows.
        columns: Statistics of its columns.
        bias: Of all logits.

    Returns:
        Which pairs are neither positive nor negative; None where there is no such thing.
    """
    if isinstance(matches, OwnPairs):
        values, own_rows, own_columns = matches.diagonal(logits, tile)
        for axis, span in ((rows, own_rows), (columns, own_columns)):
            axis.positive_sum[span] = values if bias is None else values + bias
        return None
    positive, ignored = matches.masks(tile)
    if logits.is_cuda or positive.any():  # asking a GPU would mean to wait for it
        whole = logits if bias is None else logits + bias
        values = torch.where(positive, whole, 0)
        best = torch.where(positive, whole, torch.finfo(logits.dtype).min)
        for axis, span, dim in tile.scored(rows, columns):
            axis.positive_sum[span] += values.sum(dim)
            axis.positive_count[span] += positive.sum(dim)
            axis.positive_max[span] = torch.maximum(axis.positive_max[span], best.amax(dim))
    if ignored is not None:
        for axis, span, dim in tile.scored(rows, columns):
            axis.ignored[span] += ignored.sum(dim)
    return ignored


def subtract_matches_(
    matches: OwnPairs | SharedIds,
    weights: Float[Tensor, "rows columns"],
    tile: Tile,
    row_weight: Float[Tensor, " block_rows"],
    column_weight: Float[Tensor, " block_columns"],
) -> None:
    """Subtract from a tile's weights, where a pair is positive, its row's and column's weight."""
    if isinstance(matches, OwnPairs):
        values, own_rows, own_columns = matches.diagonal(weights, tile)
        values -= row_weight[own_rows] + column_weight[own_columns]
        return
    positive, ignored = matches.masks(tile)
    if ignored is not None:
        weights.masked_fill_(ignored, 0)
    if weights.is_cuda or positive.any():
        targets = row_weight[tile.rows, None] + column_weight[None, tile.columns]
        weights.addcmul_(positive.to(weights.dtype), targets, value=-1)


def refuse_second_derivative() -> None:
    """Refuse a backward pass whose own gradient is asked for, instead of giving none.

    Raises:
        NotImplementedError: it is.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "the contrastive loss can be differentiated once; expected create_graph=False"
        )
