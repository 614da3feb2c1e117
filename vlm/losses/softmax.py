"""The symmetric cross-entropy of a rank's block, streamed in tiles."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vlm.losses.axis import AxisStatistics
from vlm.losses.block import Block, TileBuffer, refuse_second_derivative
from vlm.losses.kernels import add_product, exp_sums_, softmax_weights

# A tile of logits, or of exp(logits - offset), and the offset; by its first row and column.
_Kept = dict[tuple[int, int], tuple[Tensor, float | None]]

# From here on float32 cannot hold a log-sum-exp to the digits that its softmax needs. CLIP's
# scale ends at 100.
_LARGE_SCALE = 128.0


def softmax_loss(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    logit_scale: Float[Tensor, ""],
    block: Block,
) -> tuple[Float[Tensor, ""], AxisStatistics, AxisStatistics]:
    """Return this rank's share of the symmetric cross-entropy, and statistics of its samples.

    With `z = logit_scale * rows @ columns.T` over the whole group, the loss of row i is
    `logsumexp_j z_ij - (1 - e) mean_{j in P(i)} z_ij - e mean_j z_ij`, where P(i) are its
    positives and e is the label smoothing; a row without positives has none. With one positive a
    row this is CLIP's loss (Radford et al. 2021, figure 3), with several UniCL's (Yang et al.
    2022, equations 4 and 5). The mean of the shares over the group's ranks is half the mean over
    all rows plus half the mean over all columns.

    Every rank must differentiate its share with the same factor: the gradient that a rank gives
    to another's rows takes that factor for the other's.

    Args:
        rows: Images of the mesh row, this rank's among them.
        columns: Texts of the mesh column, this rank's among them.
        logit_scale: Inverse temperature.
        block: What lies where, and how to compute it.
    """
    row_stats, column_stats = block.statistics(rows)
    loss = _SoftmaxLoss.apply(rows, columns, logit_scale, block, row_stats, column_stats)
    return loss, row_stats, column_stats


class _SoftmaxLoss(torch.autograd.Function):
    """Reads the block once forward; reads it again backward, where it is not kept.

    Forward, the ranks of a mesh row (column) merge their rows' (columns') statistics. Backward,
    a pair's share of its row's and of its column's softmax follows from the merged
    log-sum-exps, and is multiplied into the gradients of both sides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        block: Block,
        row_stats: AxisStatistics,
        column_stats: AxisStatistics,
    ) -> Tensor:
        # Without a backward pass to come nothing is kept.
        keep_bytes = block.plan.kept_bytes if any(ctx.needs_input_grad) else 0.0
        with torch.autocast(rows.device.type, enabled=False):
            kept = _read(rows, columns, logit_scale, block, row_stats, column_stats, keep_bytes)
        # Both wait for other ranks; every rank of the group merges rows first.
        row_stats.merge(block.mesh.row)
        column_stats.merge(block.mesh.column)
        # The mean over the group's ranks undoes `group_size`; the half is for two directions.
        share = block.group_size / 2
        row_share, column_share = (
            share / max(layout.total, 1) for layout in (block.rows, block.columns)
        )
        ctx.block = block
        large = logit_scale.item() > _LARGE_SCALE
        ctx.row_targets = _targets(row_stats, len(rows), row_share, large=large)
        ctx.column_targets = _targets(column_stats, len(columns), column_share, large=large)
        ctx.kept = [(place, offset) for place, (_, offset) in kept.items()]
        # The big ones are saved in autograd's way, which frees them after the backward pass.
        ctx.save_for_backward(rows, columns, logit_scale, *(logits for logits, _ in kept.values()))
        return row_stats.losses().sum() * row_share + column_stats.losses().sum() * column_share

    @staticmethod
    def backward(
        ctx: Any, factor: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        refuse_second_derivative()
        rows, columns, logit_scale, *tensors = ctx.saved_tensors
        block, of_rows, of_columns = ctx.block, ctx.row_targets, ctx.column_targets
        kept: _Kept = {
            place: (logits, offset)
            for (place, offset), logits in zip(ctx.kept, tensors, strict=True)
        }
        for_rows, for_columns, for_scale, *_ = ctx.needs_input_grad
        # The scale's gradient follows from either side's: sum w_ij x_i y_j = sum_i x_i (w y)_i.
        for_rows = for_rows or (for_scale and not for_columns)
        row_gradient = torch.zeros_like(rows) if for_rows else None
        column_gradient = torch.zeros_like(columns) if for_columns else None
        scale, buffer, dtype = logit_scale.item(), TileBuffer(rows), block.product_dtype
        with torch.autocast(rows.device.type, enabled=False):
            for tile in block.tiles(rows, columns):
                tile_rows, tile_columns = rows[tile.rows], columns[tile.columns]
                state = kept.get((tile.rows.start, tile.columns.start))
                logits, offset = state or (
                    buffer.similarities(tile_rows, tile_columns, scale, dtype), None
                )  # fmt: skip
                weights = softmax_weights(
                    logits, offset,
                    of_rows.log_sum_exp[tile.rows], of_rows.softmax[tile.rows],
                    of_columns.log_sum_exp[tile.columns], of_columns.softmax[tile.columns],
                    # A second backward pass may read what was kept again.
                    scratch=buffer.scratch(logits), overwrite=state is None,
                )  # fmt: skip
                if of_rows.candidate is not None and of_columns.candidate is not None:
                    weights.sub_(of_rows.candidate[tile.rows, None])
                    weights.sub_(of_columns.candidate[None, tile.columns])
                block.matches.subtract_from_(weights, tile, of_rows.positive, of_columns.positive)
                # In place, into the rows of a view: gradients add up over tiles.
                if row_gradient is not None:
                    add_product(row_gradient[tile.rows], weights, tile_columns, dtype)
                if column_gradient is not None:
                    add_product(column_gradient[tile.columns], weights.T, tile_rows, dtype)
        side, gradient = (rows, row_gradient) if for_rows else (columns, column_gradient)
        scale_gradient = None
        if for_scale:
            assert gradient is not None
            total = torch.linalg.vecdot(gradient, side).sum() * factor
            scale_gradient = total.to(logit_scale.dtype)
        for each in (row_gradient, column_gradient):
            if each is not None:
                each.mul_(scale * factor)  # only now: the scale's gradient is without the scale
        return row_gradient, column_gradient, scale_gradient, None, None, None


def _read(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    block: Block,
    row_stats: AxisStatistics,
    column_stats: AxisStatistics,
    keep_bytes: float,
) -> _Kept:
    """Fill the statistics of both axes, and keep as many tiles as the memory allows."""
    # .item() waits for the device: a matrix product takes its factor as a number.
    scale, buffer, kept = logit_scale.item(), TileBuffer(rows), {}
    for tile in block.tiles(rows, columns):
        logits = buffer.similarities(
            rows[tile.rows], columns[tile.columns], scale, block.product_dtype
        )
        ignored = block.matches.add_to(row_stats, column_stats, logits, tile)
        if block.plan.label_smoothing:
            seen = logits if ignored is None else logits.masked_fill(ignored, 0)
            for stats, span, dim in tile.scored(row_stats, column_stats):
                assert stats.logit_sum is not None
                stats.logit_sum[span] += seen.sum(dim)
        if ignored is not None:
            # exp of the lowest finite number is 0, and differences of it stay finite.
            logits.masked_fill_(ignored, torch.finfo(logits.dtype).min)
        sums, offset = exp_sums_(logits)
        if tile.rows_scored:
            row_stats.add(tile.rows, sums.row_max, sums.row_sum)
        if tile.columns_scored:
            column_stats.add(tile.columns, sums.column_max, sums.column_sum)
        if logits.nbytes <= keep_bytes:
            keep_bytes -= logits.nbytes
            kept[tile.rows.start, tile.columns.start] = (logits, offset)
            buffer.give_away()  # or the next tile would overwrite this one
    return kept


class _Targets(NamedTuple):
    """What a pair's gradient takes from its row, or from its column."""

    log_sum_exp: Float[Tensor, " count"]
    """Infinite where there is no loss, so that the pair's part of the softmax is 0."""
    softmax: Float[Tensor, " count"]
    """Weight of its part of the softmax."""
    positive: Float[Tensor, " count"]
    """What each positive takes off."""
    candidate: Float[Tensor, " count"] | None
    """What label smoothing takes off each candidate."""


def _targets(stats: AxisStatistics, count: int, share: float, *, large: bool) -> _Targets:
    """Return the targets of `count` rows, of which the last may be candidates only.

    The weight of a row's loss in the total is `share`.
    """
    log_sum_exp, positives = stats.log_sum_exp, stats.positive_count
    assert log_sum_exp is not None
    assert stats.exp_sum is not None
    rounded_off = None
    if large:
        # max + log(sum) without the rounding is log_sum_exp + rounded_off.
        rounded_off = stats.exp_sum.log() - (log_sum_exp - stats.max)
    weight = torch.full_like(log_sum_exp, share)
    if positives is not None:
        scored = positives > 0
        log_sum_exp = torch.where(scored, log_sum_exp, torch.inf)
        weight = scored.to(log_sum_exp.dtype) * share
    positive = weight * (1 - stats.smoothing) if stats.smoothing else weight
    if positives is not None:
        positive = positive / positives.clamp(min=1)
    candidate = stats.smoothing * weight / stats.candidates if stats.smoothing else None
    if rounded_off is not None:
        weight = weight * (-rounded_off).exp_()
    # Banked rows stand behind the scored ones and pull nothing: exp(z - inf) and all weights are 0.
    unscored = count - stats.layout.scored
    if unscored:
        log_sum_exp = F.pad(log_sum_exp, (0, unscored), value=torch.inf)
        weight, positive = F.pad(weight, (0, unscored)), F.pad(positive, (0, unscored))
        candidate = None if candidate is None else F.pad(candidate, (0, unscored))
    return _Targets(log_sum_exp, weight, positive, candidate)
