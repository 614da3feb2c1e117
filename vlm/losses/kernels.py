"""What is computed on one tile of similarities, on any device.

On CUDA each function is one fused kernel that torch.compile makes of the plain form below. On
other devices the softmax's functions share one exponential between rows and columns wherever the
numbers allow it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Two numbers that differ by less than this in the exponent can share an offset in float32, whose
# smallest normal number is exp(-87): what underflows is then below exp(60 - 87) of its sum.
_SHARED_RANGE = 60.0

# From here on softplus is taken for the identity; torch's own 20 would be off by 2e-9.
_LINEAR_FROM = 40


class TileSums(NamedTuple):
    """Maxima and sums of a tile's rows and columns."""

    row_max: Float[Tensor, " rows"]
    row_sum: Float[Tensor, " rows"]
    column_max: Float[Tensor, " columns"]
    column_sum: Float[Tensor, " columns"]


def scaled_product(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    scale: float,
    out: Float[Tensor, "rows columns"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """Return all inner products times `scale`, in `out`'s type.

    Args:
        rows: One side.
        columns: The other.
        scale: What a matrix product multiplies by at no cost.
        out: Where they go.
        dtype: In which to multiply; sums are `out`'s type whatever it is.
    """
    if dtype == out.dtype:
        return torch.addmm(out, rows, columns.T, beta=0, alpha=scale, out=out)
    product: Tensor = torch.ops.aten.addmm.dtype_out(
        out, rows.to(dtype), columns.to(dtype).T, out.dtype, beta=0, alpha=scale, out=out
    )
    return product


def add_product(
    total: Float[Tensor, "rows dim"],
    weights: Float[Tensor, "rows columns"],
    columns: Float[Tensor, "columns dim"],
    dtype: torch.dtype,
) -> None:
    """Add `weights @ columns` to `total`, multiplied in `dtype` and summed in `total`'s type."""
    if dtype == total.dtype:
        total.addmm_(weights, columns)
    else:
        total += torch.mm(weights.to(dtype), columns.to(dtype), out_dtype=total.dtype)


def exp_sums_(logits: Float[Tensor, "rows columns"]) -> tuple[TileSums, float | None]:
    """Return maxima, and sums of exponentials relative to them.

    Returns:
        The sums, and an offset: `logits` now holds `exp(logits - offset)`. None where one offset
        would not do for all rows and columns, and `logits` is as it was.
    """
    if logits.is_cuda:
        return TileSums(*_compiled(_exp_sums)(logits)), None
    row_max, column_max = logits.amax(1), logits.amax(0)
    top = row_max.max().item()
    if top - min(row_max.min().item(), column_max.min().item()) > _SHARED_RANGE:
        return TileSums(*_exp_sums(logits)), None
    logits.sub_(top).exp_()
    row_sum = logits.sum(1).mul_((top - row_max).exp_())
    column_sum = logits.sum(0).mul_((top - column_max).exp_())
    return TileSums(row_max, row_sum, column_max, column_sum), top


def softmax_weights(
    logits: Float[Tensor, "rows columns"],
    offset: float | None,
    row_log_sum_exp: Float[Tensor, " rows"],
    row_weight: Float[Tensor, " rows"],
    column_log_sum_exp: Float[Tensor, " columns"],
    column_weight: Float[Tensor, " columns"],
    *,
    scratch: Float[Tensor, "rows columns"] | None = None,
    overwrite: bool = False,
) -> Float[Tensor, "rows columns"]:
    """Return every pair's share of its row's and of its column's softmax, weighted and added.

    Args:
        logits: The tile, or `exp(logits - offset)` where there is an offset.
        offset: As `exp_sums_` gave it.
        row_log_sum_exp: Of the whole rows, infinite for a row that has no loss.
        row_weight: Of each row's loss in the total.
        column_log_sum_exp: As for rows.
        column_weight: As for rows.
        scratch: Memory that the result may take.
        overwrite: Whether `logits` may be lost.
    """
    if offset is None and not logits.is_cuda:
        top = min(row_log_sum_exp.max().item(), column_log_sum_exp.max().item())
        low = min(row_log_sum_exp.min().item(), column_log_sum_exp.min().item())
        if top - low <= _SHARED_RANGE:
            logits, offset = (logits.sub_(top) if overwrite else logits - top).exp_(), top
    if offset is not None:
        rows = row_weight * (offset - row_log_sum_exp).exp_()
        columns = column_weight * (offset - column_log_sum_exp).exp_()
        return torch.add(rows[:, None], columns[None, :], out=scratch).mul_(logits)
    weigh = _compiled(_softmax_weights) if logits.is_cuda else _softmax_weights
    weights: Tensor = weigh(logits, row_log_sum_exp, row_weight, column_log_sum_exp, column_weight)
    return weights


def sigmoid_sums_(
    logits: Float[Tensor, "rows columns"],
    bias: Float[Tensor, ""],
    scratch: Float[Tensor, "rows columns"] | None = None,
) -> tuple[TileSums, Float[Tensor, "rows columns"]]:
    """Return what a tile is as pairs that do not match, and the derivative of that.

    Args:
        logits: The tile without its bias; it may be overwritten.
        bias: To be added to each.
        scratch: Memory of the tile's size to work in.

    Returns:
        The maxima of rows and columns and their sums of `softplus(logits + bias)`, and
        `sigmoid(logits + bias)`.
    """
    if logits.is_cuda:
        *sums, weights = _compiled(_sigmoid_sums)(logits, bias)
        return TileSums(*sums), weights
    logits.add_(bias)
    row_max, column_max = logits.amax(1), logits.amax(0)
    losses = torch.empty_like(logits) if scratch is None else scratch
    torch.ops.aten.softplus.out(logits, 1, _LINEAR_FROM, out=losses)
    return TileSums(row_max, losses.sum(1), column_max, losses.sum(0)), logits.sigmoid_()


def _exp_sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_max, column_max = logits.amax(1), logits.amax(0)
    row_sum = (logits - row_max[:, None]).exp().sum(1)
    column_sum = (logits - column_max[None, :]).exp().sum(0)
    return row_max, row_sum, column_max, column_sum


def _softmax_weights(
    logits: Tensor, row_lse: Tensor, row_weight: Tensor, column_lse: Tensor, column_weight: Tensor
) -> Tensor:
    of_rows = (logits - row_lse[:, None]).exp() * row_weight[:, None]
    return of_rows + (logits - column_lse[None, :]).exp() * column_weight[None, :]


def _sigmoid_sums(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits = logits + bias
    losses = F.softplus(logits, threshold=_LINEAR_FROM)
    return logits.amax(1), losses.sum(1), logits.amax(0), losses.sum(0), logits.sigmoid()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fuse a function of tensors; sizes of tiles may vary without compiling anew."""
    return torch.compile(function, dynamic=True)
