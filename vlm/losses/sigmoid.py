"""The pairwise sigmoid loss of a rank's block, streamed in tiles."""

from typing import Any

import torch
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
from vlm.losses.kernels import add_product, sigmoid_sums_
from vlm.losses.matches import tiles


def sigmoid_loss(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    block: Block,
) -> tuple[Float[Tensor, ""], RowStatistics, RowStatistics]:
    """Return this rank's share of the sigmoid loss, and statistics of its samples.

    With `z = logit_scale * rows @ columns.T + logit_bias` over the whole group, the loss is the
    sum over pairs of `softplus(-z)` for positives and `softplus(z)` for others, divided by the
    number of rows (SigLIP: Zhai et al. 2023, section 3.2). The mean of the shares over the
    group's ranks is that loss. Every rank must differentiate its share with the same factor.

    Args:
        rows: Images of the mesh row, this rank's among them.
        columns: Texts of the mesh column, this rank's among them.
        logit_scale: Inverse temperature.
        logit_bias: Added to every scaled similarity.
        block: What lies where, and how to compute it.
    """
    loss, of_rows, of_columns = _SigmoidLoss.apply(rows, columns, logit_scale, logit_bias, block)
    return loss, _row_statistics(of_rows), _row_statistics(of_columns)


def _row_statistics(stacked: Float[Tensor, "3 local"]) -> RowStatistics:
    loss, positive_logit, correct = stacked
    return RowStatistics(loss, positive_logit, None, correct.bool())


class _SigmoidLoss(torch.autograd.Function):
    """Reads the block once: without a normaliser the gradient is known in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor]:
        row_stats = AxisStatistics(block.rows, block.columns, block, rows, ["loss_sum"])
        column_stats = AxisStatistics(block.columns, block.rows, block, rows, ["loss_sum"])
        gradients = _Gradients(rows, columns, ctx.needs_input_grad)
        with torch.autocast(rows.device.type, enabled=False):
            _read(rows, columns, logit_scale, logit_bias, block, row_stats, column_stats, gradients)
        row_stats.merge(block.mesh.row)
        column_stats.merge(block.mesh.column)
        own_rows, own_columns = _own_statistics(row_stats), _own_statistics(column_stats)
        ctx.weight = block.group_size / max(block.rows.total, 1)
        ctx.types = (logit_scale.dtype, logit_bias.dtype)
        ctx.save_for_backward(
            logit_scale, gradients.of_rows, gradients.of_columns, gradients.of_scale(),
            gradients.of_bias,
        )  # fmt: skip
        ctx.mark_non_differentiable(own_rows, own_columns)
        return own_rows[0].sum() * ctx.weight, own_rows, own_columns

    @staticmethod
    def backward(
        ctx: Any, factor: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        refuse_second_derivative()
        logit_scale, of_rows, of_columns, of_scale, of_bias = ctx.saved_tensors
        for_rows, for_columns, for_scale, for_bias, _ = ctx.needs_input_grad
        factor = factor * ctx.weight
        scale_dtype, bias_dtype = ctx.types
        return (
            of_rows * (factor * logit_scale) if for_rows else None,
            of_columns * (factor * logit_scale) if for_columns else None,
            (of_scale * factor).to(scale_dtype) if for_scale else None,
            (of_bias * factor).to(bias_dtype) if for_bias else None,
            None,
        )


class _Gradients:
    """Unscaled gradients of the sum over the block's pairs, as they add up tile by tile."""

    def __init__(
        self, rows: Tensor, columns: Tensor, needed: tuple[bool, bool, bool, bool, bool]
    ) -> None:
        for_rows, for_columns, for_scale, for_bias, _ = needed
        for_rows = for_rows or (for_scale and not for_columns)
        self.rows, self.columns = rows, columns
        self.of_rows = torch.zeros_like(rows) if for_rows else None
        self.of_columns = torch.zeros_like(columns) if for_columns else None
        self.of_bias = rows.new_zeros(()) if for_bias else None

    def of_scale(self) -> Tensor | None:
        """Return the scale's, which follows from either side's."""
        for side, gradient in ((self.rows, self.of_rows), (self.columns, self.of_columns)):
            if gradient is not None:
                total: Tensor = torch.linalg.vecdot(gradient, side).sum()
                return total
        return None


def _read(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    block: Block,
    row_stats: AxisStatistics,
    column_stats: AxisStatistics,
    gradients: _Gradients,
) -> None:
    """Fill the statistics of both axes and the gradients that are needed."""
    scale, bias = logit_scale.item(), logit_bias.to(rows.dtype)
    ones = rows.new_ones(max(len(rows), len(columns)))
    buffer, dtype = TileBuffer(rows), block.product_dtype
    shape = (len(rows), len(columns))
    for tile in tiles(shape, (block.rows.scored, block.columns.scored), block.tile):
        logits = buffer.similarities(rows[tile.rows], columns[tile.columns], scale, dtype)
        ignored = read_matches(block.matches, logits, tile, row_stats, column_stats, bias)
        if ignored is not None:
            logits.masked_fill_(ignored, torch.finfo(logits.dtype).min)
        sums, weights = sigmoid_sums_(logits, bias, buffer.scratch(logits))
        if tile.rows_scored:
            row_stats.add_losses(tile.rows, sums.row_max, sums.row_sum)
        if tile.columns_scored:
            column_stats.add_losses(tile.columns, sums.column_max, sums.column_sum)
        subtract_matches_(block.matches, weights, tile, ones / 2, ones / 2)
        if gradients.of_rows is not None:
            add_product(gradients.of_rows[tile.rows], weights, columns[tile.columns], dtype)
        if gradients.of_columns is not None:
            add_product(gradients.of_columns[tile.columns], weights.T, rows[tile.rows], dtype)
        if gradients.of_bias is not None:
            gradients.of_bias += weights.sum()


def _own_statistics(stats: AxisStatistics) -> Float[Tensor, "3 local"]:
    """Return loss, positive logit and correctness of this rank's samples."""
    own = stats.layout.own
    positive_logit, correct = stats.own_positives()
    loss = stats.loss_sum[own] - stats.positive_sum[own]
    return torch.stack([loss, positive_logit, correct.to(loss.dtype)])
