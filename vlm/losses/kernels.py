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


class ExpSums(NamedTuple):
    """Maxima of a tile's rows and columns, and sums of exponentials relative to them."""

    row_max: Float[Tensor, " rows"]
    row_sum: Float[Tensor, " rows"]
    column_max: Float[Tensor, " columns"]
    column_sum: Float[Tensor, " columns"]


def product(
    rows: Float[Tensor, "rows dim"],
    columns: Float[Tensor, "columns dim"],
    out: Float[Tensor, "rows columns"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """Return all inner products, in `out`'s type.

    Args:
        rows: One side.
        columns: The other.
        out: Where they go, where the multiplication can write there.
        dtype: In which to multiply; sums are `out`'s type whatever it is.
    """
    if dtype == out.dtype:
        return torch.mm(rows, columns.T, out=out)
    return torch.mm(rows.to(dtype), columns.to(dtype).T, out_dtype=out.dtype)


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


def exp_sums_(logits: Float[Tensor, "rows columns"]) -> tuple[ExpSums, float | None]:
    """Return the tile's exponential sums, and what was subtracted where `logits` was overwritten.

    Returns:
        The sums, and an offset: `logits` now holds `exp(logits - offset)`. None where one offset
        would not do for all rows and columns, and `logits` is as it was.
    """
    if logits.is_cuda:
        return ExpSums(*_compiled(_exp_sums)(logits)), None
    row_max, column_max = logits.amax(1), logits.amax(0)
    top = row_max.max().item()
    if top - min(row_max.min().item(), column_max.min().item()) > _SHARED_RANGE:
        return ExpSums(*_exp_sums(logits)), None
    logits.sub_(top).exp_()
    row_sum = logits.sum(1).mul_((top - row_max).exp_())
    column_sum = logits.sum(0).mul_((top - column_max).exp_())
    return ExpSums(row_max, row_sum, column_max, column_sum), top


def softmax_weights(
    logits: Float[Tensor, "rows columns"],
    offset: float | None,
    row_log_sum_exp: Float[Tensor, " rows"],
    column_log_sum_exp: Float[Tensor, " columns"],
    row_weight: Float[Tensor, " rows"],
    column_weight: Float[Tensor, " columns"],
) -> Float[Tensor, "rows columns"]:
    """Return every pair's share of its row's and of its column's softmax, weighted and added.

    Args:
        logits: The tile, or `exp(logits - offset)` where there is an offset; it is kept.
        offset: As `exp_sums_` gave it.
        row_log_sum_exp: Of the whole rows, infinite for a row that has no loss.
        column_log_sum_exp: Of the whole columns, likewise.
        row_weight: Of each row's loss in the total.
        column_weight: Of each column's.
    """
    if offset is None and not logits.is_cuda:
        top = min(row_log_sum_exp.max().item(), column_log_sum_exp.max().item())
        low = min(row_log_sum_exp.min().item(), column_log_sum_exp.min().item())
        if top - low <= _SHARED_RANGE:
            logits, offset = (logits - top).exp_(), top
    if offset is not None:
        rows = row_weight * (offset - row_log_sum_exp).exp_()
        columns = column_weight * (offset - column_log_sum_exp).exp_()
        return torch.add(rows[:, None], columns[None, :]).mul_(logits)
    weigh = _compiled(_softmax_weights) if logits.is_cuda else _softmax_weights
    weights: Tensor = weigh(logits, row_log_sum_exp, column_log_sum_exp, row_weight, column_weight)
    return weights


def softplus_and_sigmoid(
    logits: Float[Tensor, "rows columns"],
) -> tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]]:
    """Return the loss of every pair taken as a negative, and its derivative."""
    plain = _compiled(_softplus_and_sigmoid) if logits.is_cuda else _softplus_and_sigmoid
    values: tuple[Tensor, Tensor] = plain(logits)
    return values


def _exp_sums(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_max, column_max = logits.amax(1), logits.amax(0)
    row_sum = (logits - row_max[:, None]).exp().sum(1)
    column_sum = (logits - column_max[None, :]).exp().sum(0)
    return row_max, row_sum, column_max, column_sum


def _softmax_weights(
    logits: Tensor, row_lse: Tensor, column_lse: Tensor, row_weight: Tensor, column_weight: Tensor
) -> Tensor:
    of_rows = (logits - row_lse[:, None]).exp() * row_weight[:, None]
    return of_rows + (logits - column_lse[None, :]).exp() * column_weight[None, :]


def _softplus_and_sigmoid(logits: Tensor) -> tuple[Tensor, Tensor]:
    # Above the threshold softplus is taken for the identity; by default it is 20, off by 2e-9.
    return F.softplus(logits, threshold=40), logits.sigmoid()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fuse a function of tensors; sizes of tiles may vary without compiling anew."""
    return torch.compile(function, dynamic=True)
