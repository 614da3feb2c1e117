"""The pairwise sigmoid loss of a rank's block, streamed in tiles."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.losses.axis import AxisStatistics
from vlm.losses.block import Block, TileBuffer, refuse_second_derivative
from vlm.losses.kernels import add_product, sigmoid_sums_


def sigmoid_loss(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    block: Block,
) -> tuple[Float[Tensor, ""], AxisStatistics, AxisStatistics]:
    """Return this rank's share of the sigmoid loss, and statistics of its samples.

    With `z = logit_scale * rows @ columns.T + logit_bias` over the whole group, the loss is the
    sum over pairs of `softplus(-z)` for positives and `softplus(z)` for others, divided by the
    number of rows (SigLIP: Zhai et al. 2023, section 3.2). The mean of the shares over the
    group's ranks is that loss. Arguments and gradients are as in `softmax_loss`.
    """
    row_stats, column_stats = block.statistics(rows)
    loss = _SigmoidLoss.apply(
        rows, columns, logit_scale, logit_bias, block, row_stats, column_stats
    )
    return loss, row_stats, column_stats


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
        row_stats: AxisStatistics,
        column_stats: AxisStatistics,
    ) -> Tensor:
        for_rows, for_columns, for_scale, for_bias, *_ = ctx.needs_input_grad
        # The scale's gradient follows from either side's: sum w_ij x_i y_j = sum_i x_i (w y)_i.
        for_rows = for_rows or (for_scale and not for_columns)
        row_gradient = torch.zeros_like(rows) if for_rows else None
        column_gradient = torch.zeros_like(columns) if for_columns else None
        bias_gradient = rows.new_zeros(()) if for_bias else None
        gradients = row_gradient, column_gradient, bias_gradient
        with torch.autocast(rows.device.type, enabled=False):
            _read(
                rows, columns, logit_scale, logit_bias, block, (row_stats, column_stats), gradients
            )
            scale_gradient = None
            for side, gradient in ((rows, row_gradient), (columns, column_gradient)):
                if gradient is not None and scale_gradient is None:
                    scale_gradient = torch.linalg.vecdot(gradient, side).sum()
        # Both wait for other ranks. The loss needs neither's sums, each sample's statistics do.
        row_stats.merge(block.mesh.row)
        column_stats.merge(block.mesh.column)
        # The mean over the group's ranks undoes `group_size`.
        ctx.weight = block.group_size / max(block.rows.total, 1)
        ctx.types = (logit_scale.dtype, logit_bias.dtype)
        ctx.save_for_backward(
            logit_scale, row_gradient, column_gradient, scale_gradient, bias_gradient
        )
        loss: Tensor = row_stats.losses().sum() * ctx.weight
        return loss

    @staticmethod
    def backward(
        ctx: Any, factor: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        refuse_second_derivative()
        logit_scale, of_rows, of_columns, of_scale, of_bias = ctx.saved_tensors
        for_rows, for_columns, for_scale, for_bias, *_ = ctx.needs_input_grad
        factor = factor * ctx.weight
        scale_dtype, bias_dtype = ctx.types
        return (
            of_rows * (factor * logit_scale) if for_rows else None,
            of_columns * (factor * logit_scale) if for_columns else None,
            (of_scale * factor).to(scale_dtype) if for_scale else None,
            (of_bias * factor).to(bias_dtype) if for_bias else None,
            None, None, None,
        )  # fmt: skip


def _read(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    block: Block,
    statistics: tuple[AxisStatistics, AxisStatistics],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Fill the statistics of both axes and the gradients, which lack the scale as a factor."""
    row_stats, column_stats = statistics
    row_gradient, column_gradient, bias_gradient = gradients
    # .item() waits for the device: a matrix product takes its factor as a number.
    scale, bias = logit_scale.item(), logit_bias.to(rows.dtype)
    # Half of a pair's loss is its row's and half its column's.
    halves = rows.new_full((max(len(rows), len(columns)),), 0.5)
    buffer, dtype = TileBuffer(rows), block.product_dtype
    for tile in block.tiles(rows, columns):
        tile_rows, tile_columns = rows[tile.rows], columns[tile.columns]
        logits = buffer.similarities(tile_rows, tile_columns, scale, dtype)
        ignored = block.matches.add_to(row_stats, column_stats, logits, tile, bias)
        if ignored is not None:
            # softplus and sigmoid of the lowest finite number are 0.
            logits.masked_fill_(ignored, torch.finfo(logits.dtype).min)
        sums, weights = sigmoid_sums_(logits, bias, buffer.scratch(logits))
        if tile.rows_scored:
            row_stats.add_losses(tile.rows, sums.row_max, sums.row_sum)
        if tile.columns_scored:
            column_stats.add_losses(tile.columns, sums.column_max, sums.column_sum)
        block.matches.subtract_from_(weights, tile, halves, halves)
        if row_gradient is not None:
            add_product(row_gradient[tile.rows], weights, tile_columns, dtype)
        if column_gradient is not None:
            add_product(column_gradient[tile.columns], weights.T, tile_rows, dtype)
        if bias_gradient is not None:
            bias_gradient += weights.sum()
