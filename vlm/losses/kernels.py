"""What is computed on one tile of similarities.

On CUDA torch.compile makes one fused kernel of the plain forms at the end. On other devices the
softmax's functions share one exponential between rows and columns where the range allows it.
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

# Where softplus becomes the identity; at torch's own 20 that would be off by 2e-9, a bias over
# millions of pairs.
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
    """Write all inner products times `scale` to `out`; multiply in `dtype`, sum in `out`'s type."""
    if dtype == out.dtype:
        # With beta 0 what `out` held is ignored, even nan; a product takes alpha at no cost.
        return torch.addmm(out, rows, columns.T, beta=0, alpha=scale, out=out)
    # Only the operator itself takes an output type that is wider than its inputs' (CUDA alone).
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
        The sums, and an offset: `logits` now holds `exp(logits - offset)`. None where no single
        offset does for all rows and columns, and `logits` is as it was.
    """
    if logits.is_cuda:
        return TileSums(*_compiled(_exp_sums)(logits)), None
    row_max, column_max = logits.amax(1), logits.amax(0)
    top = row_max.max().item()
    # Only maxima matter: a row's small terms may underflow, its largest may not.
    if top - min(row_max.min().item(), column_max.min().item()) > _SHARED_RANGE:
        return TileSums(*_exp_sums(logits)), None
    logits.sub_(top).exp_()
    # From sums relative to the tile's maximum to sums relative to each row's and column's.
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
    """Return every pair's part of its row's and of its column's softmax, weighted and added.

    Args:
        logits: The tile, or `exp(logits - offset)` where there is an offset.
        offset: As `exp_sums_` gave it.
        row_log_sum_exp: Of the whole rows, infinite for a row that has no loss; so for columns.
        row_weight: Of each row's loss in the total.
        column_log_sum_exp: Of the whole columns.
        column_weight: Of each column's loss.
        scratch: Memory that the result may take.
        overwrite: Whether `logits` may be lost.
    """
    if offset is None and not logits.is_cuda:
        # No logit exceeds its row's or its column's log-sum-exp, so that exp(z - top) <= 1.
        top = min(row_log_sum_exp.max().item(), column_log_sum_exp.max().item())
        low = min(row_log_sum_exp.min().item(), column_log_sum_exp.min().item())
        if top - low <= _SHARED_RANGE:
            logits, offset = (logits.sub_(top) if overwrite else logits - top).exp_(), top
    if offset is not None:
        # exp(z - lse) = exp(z - offset) exp(offset - lse): one exponential a row, not one a pair.
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
    """Return a tile's losses, as if no pair matched, and their derivatives.

    Args:
        logits: The tile without its bias; it may be overwritten.
        bias: Added to each logit.
        scratch: Memory of the tile's size to work in.

    Returns:
        Maxima and sums of `softplus(logits + bias)`, and `sigmoid(logits + bias)`.
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
    """Fuse a function of tensors."""
    # dynamic: the last tiles of a block are smaller, and would each be compiled anew.
    return torch.compile(function, dynamic=True)
