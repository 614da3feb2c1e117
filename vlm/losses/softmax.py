"""The symmetric cross-entropy of a rank's block, streamed in tiles."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vlm.losses.block import (
    AxisStatistics,
    Block,
    RowStatistics,
    TileBuffer,
    read_matches,
    refuse_second_derivative,
    subtract_matches_,
)
from vlm.losses.kernels import add_product, exp_sums_, softmax_weights
from vlm.losses.matches import Tile, tiles

# A tile of logits, or of exp(logits - offset), and the offset; by its first row and column.
_Kept = dict[tuple[int, int], tuple[Tensor, float | None]]


def softmax_loss(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    logit_scale: Float[Tensor, ""],
    block: Block,
) -> tuple[Float[Tensor, ""], RowStatistics, RowStatistics]:
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
    loss, of_rows, of_columns = _SoftmaxLoss.apply(rows, columns, logit_scale, block)
    return loss, _row_statistics(of_rows), _row_statistics(of_columns)


def _row_statistics(stacked: Float[Tensor, "4 local"]) -> RowStatistics:
    loss, positive_logit, log_sum_exp, correct = stacked
    return RowStatistics(loss, positive_logit, log_sum_exp, correct.bool())


class _SoftmaxLoss(torch.autograd.Function):
    """Reads the block once forward; reads it again backward, where it is not kept.

    Forward, the ranks of a mesh row (column) merge their rows' (columns') statistics. Backward,
    a pair's share of its row's and of its column's softmax follows from the merged
    log-sum-exps, and is multiplied into the gradients of both sides.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, logit_scale: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = ["exp_sum", "logit_sum"] if block.label_smoothing else ["exp_sum"]
        row_stats = AxisStatistics(block.rows, block.columns, block, rows, sums)
        column_stats = AxisStatistics(block.columns, block.rows, block, rows, sums)
        keep_bytes = block.kept_bytes if any(ctx.needs_input_grad) else 0.0
        with torch.autocast(rows.device.type, enabled=False):
            kept = _read(rows, columns, logit_scale, block, row_stats, column_stats, keep_bytes)
        row_stats.merge(block.mesh.row)
        column_stats.merge(block.mesh.column)
        ctx.block = block
        ctx.kept = [(place, offset) for place, (_, offset) in kept.items()]
        ctx.save_for_backward(
            rows, columns, logit_scale,
            _targets(row_stats, len(rows), block),
            _targets(column_stats, len(columns), block),
            *(logits for logits, _ in kept.values()),
        )  # fmt: skip
        own_rows = _own_statistics(row_stats, block.label_smoothing)
        own_columns = _own_statistics(column_stats, block.label_smoothing)
        share = block.group_size / 2
        loss = own_rows[0].sum() * (share / max(block.rows.total, 1))
        loss += own_columns[0].sum() * (share / max(block.columns.total, 1))
        ctx.mark_non_differentiable(own_rows, own_columns)
        return loss, own_rows, own_columns

    @staticmethod
    def backward(
        ctx: Any, factor: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        refuse_second_derivative()
        rows, columns, logit_scale, row_targets, column_targets, *tensors = ctx.saved_tensors
        block: Block = ctx.block
        kept: _Kept = {
            place: (logits, offset)
            for (place, offset), logits in zip(ctx.kept, tensors, strict=True)
        }
        for_rows, for_columns, for_scale, _ = ctx.needs_input_grad
        # The scale's gradient follows from either side's.
        for_rows = for_rows or (for_scale and not for_columns)
        row_gradient = torch.zeros_like(rows) if for_rows else None
        column_gradient = torch.zeros_like(columns) if for_columns else None
        scale, buffer = logit_scale.item(), TileBuffer(rows)
        shape = (len(rows), len(columns))
        with torch.autocast(rows.device.type, enabled=False):
            for tile in tiles(shape, (block.rows.scored, block.columns.scored), block.tile):
                state = kept.get((tile.rows.start, tile.columns.start))
                logits, offset = state or (
                    buffer.similarities(
                        rows[tile.rows], columns[tile.columns], scale, block.product_dtype
                    ),
                    None,
                )
                weights = softmax_weights(
                    logits, offset, *row_targets[:2, tile.rows],
                    *column_targets[:2, tile.columns],
                    scratch=buffer.scratch(logits), overwrite=state is None,
                )  # fmt: skip
                _subtract_targets_(weights, tile, block, row_targets, column_targets)
                if row_gradient is not None:
                    add_product(
                        row_gradient[tile.rows], weights, columns[tile.columns],
                        block.product_dtype,
                    )  # fmt: skip
                if column_gradient is not None:
                    add_product(
                        column_gradient[tile.columns], weights.T, rows[tile.rows],
                        block.product_dtype,
                    )  # fmt: skip
        side, gradient = (rows, row_gradient) if for_rows else (columns, column_gradient)
        scale_gradient = None
        if for_scale:
            assert gradient is not None
            scale_gradient = (torch.linalg.vecdot(gradient, side).sum() * factor).to(
                logit_scale.dtype
            )
        for each in (row_gradient, column_gradient):
            if each is not None:
                each.mul_(scale * factor)
        return row_gradient, column_gradient, scale_gradient, None


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
    scale, buffer, kept = logit_scale.item(), TileBuffer(rows), {}
    shape = (len(rows), len(columns))
    for tile in tiles(shape, (block.rows.scored, block.columns.scored), block.tile):
        logits = buffer.similarities(
            rows[tile.rows], columns[tile.columns], scale, block.product_dtype
        )
        ignored = read_matches(block.matches, logits, tile, row_stats, column_stats)
        if block.label_smoothing:
            seen = logits if ignored is None else logits.masked_fill(ignored, 0)
            for stats, span, dim in tile.scored(row_stats, column_stats):
                stats.logit_sum[span] += seen.sum(dim)
        if ignored is not None:
            logits.masked_fill_(ignored, torch.finfo(logits.dtype).min)
        sums, offset = exp_sums_(logits)
        if tile.rows_scored:
            row_stats.add(tile.rows, sums.row_max, sums.row_sum)
        if tile.columns_scored:
            column_stats.add(tile.columns, sums.column_max, sums.column_sum)
        if logits.nbytes <= keep_bytes:
            keep_bytes -= logits.nbytes
            kept[tile.rows.start, tile.columns.start] = (logits, offset)
            buffer.give_away()
    return kept


def _targets(stats: AxisStatistics, count: int, block: Block) -> Float[Tensor, "weights count"]:
    """Return what a pair's gradient takes from its row: log-sum-exp, and two or three weights.

    The weights are those of the row's softmax, of each of its positives and, under label
    smoothing, of each of its candidates. A row without a loss has an infinite log-sum-exp.
    """
    share, smoothing = block.group_size / 2 / max(stats.layout.total, 1), block.label_smoothing
    log_sum_exp, positives = stats.log_sum_exp, stats.positives
    if isinstance(positives, int):
        weight = torch.full_like(log_sum_exp, share)
        of_positive = weight * ((1 - smoothing) / positives)
    else:
        scored = positives > 0
        log_sum_exp = torch.where(scored, log_sum_exp, torch.inf)
        weight = scored.to(log_sum_exp.dtype) * share
        of_positive = weight * (1 - smoothing) / positives.clamp(min=1)
    targets = [log_sum_exp, weight, of_positive]
    if smoothing:
        targets.append(smoothing * weight / stats.candidates)
    table = torch.stack(targets)
    unscored = count - stats.layout.scored
    if unscored:
        table = F.pad(table, (0, unscored))
        table[0, stats.layout.scored :] = torch.inf
    return table


def _own_statistics(stats: AxisStatistics, smoothing: float) -> Float[Tensor, "4 local"]:
    """Return loss, positive logit, log-sum-exp and correctness of this rank's samples."""
    own = stats.layout.own
    log_sum_exp = stats.log_sum_exp[own]
    positive_logit, correct = stats.own_positives()
    loss = log_sum_exp - (1 - smoothing) * positive_logit
    if smoothing:
        loss -= smoothing * (stats.logit_sum / stats.candidates)[own]
    if not isinstance(stats.positives, int):
        loss = torch.where(stats.positives[own] > 0, loss, 0)
    return torch.stack([loss, positive_logit, log_sum_exp, correct.to(loss.dtype)])


def _subtract_targets_(
    weights: Float[Tensor, "rows columns"],
    tile: Tile,
    block: Block,
    row_targets: Float[Tensor, "weights block_rows"],
    column_targets: Float[Tensor, "weights block_columns"],
) -> None:
    """Subtract the targets of a tile's pairs from their shares: the derivative by each logit."""
    if block.label_smoothing:
        weights.sub_(row_targets[3, tile.rows, None]).sub_(column_targets[3, None, tile.columns])
    subtract_matches_(block.matches, weights, tile, row_targets[2], column_targets[2])
