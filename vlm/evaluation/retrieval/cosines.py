"""How the cosines of correct and of wrong pairs are distributed, of all pairs, tile by tile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from vlm.distributed.groups import SINGLE, RankGroup
from vlm.evaluation.retrieval.tiles import TiledProducts


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Where numbers lie; all but the count are NaN where there are none."""

    count: int
    mean: float
    std: float
    """Of these numbers themselves, not estimated for more."""
    min: float
    max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineStatistics:
    """The cosines of texts with images; times the model's scale they are its logits."""

    correct: Spread
    """Of the pairs that belong together."""
    wrong: Spread
    """Of all other pairs."""


@torch.inference_mode()
def cosine_statistics(
    texts: Float[np.ndarray, "texts text_dim"],
    images: Float[np.ndarray, "images image_dim"],
    matches: Int[np.ndarray, "matches 2"],
    *,
    tile: int | None = None,
    device: str | torch.device | None = None,
    group: RankGroup | None = None,
    show_progress_bar: bool = False,
) -> CosineStatistics:
    """Return mean, deviation and extremes of all cosines in one pass over their tiles.

    Sums are kept in float64. The arguments are those of
    `vlm.evaluation.retrieval.ranks.exact_ranks_both`.

    Raises:
        VlmError: as there.
    """
    products = TiledProducts(texts, images, matches, tile=tile, device=device)
    group = group or SINGLE
    sums = torch.zeros(2, dtype=torch.float64, device=products.device)
    extremes = torch.full((2,), -torch.inf, device=products.device)
    for each in products.tiles(group=group, show_progress_bar=show_progress_bar, purpose="cosines"):
        scores, pairs = each.products, each.pairs
        for place, sign in enumerate((-1, 1)):
            scores[pairs] = -sign * torch.inf
            extreme = scores.min() if sign < 0 else scores.max()
            extremes[place] = torch.maximum(extremes[place], sign * extreme)
        scores[pairs] = 0
        sums[0] += scores.sum(dtype=torch.float64)
        sums[1] += scores.square_().sum(dtype=torch.float64)
    if group.size > 1:
        dist.all_reduce(sums, group=group.process_group)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group.process_group)
    correct = products.pair_products().double()
    wrong = math.prod(products.shape) - len(correct)
    return CosineStatistics(
        correct=_spread(len(correct), [correct.sum(), correct.square().sum()], _ends(correct)),
        wrong=_spread(wrong, list(sums), [-float(extremes[0]), float(extremes[1])]),
    )


def _ends(numbers: Float[Tensor, " numbers"]) -> list[float]:
    return [float(numbers.min()), float(numbers.max())] if len(numbers) else [math.nan] * 2


def _spread(count: int, sums: Sequence[Tensor], ends: Sequence[float]) -> Spread:
    """Summarise numbers of which the sum, the sum of squares, and both ends are known."""
    if count == 0:
        return Spread(count=0, mean=math.nan, std=math.nan, min=math.nan, max=math.nan)
    mean, mean_square = (float(total) / count for total in sums)
    variance = mean_square - mean**2
    # Rounding may leave a little less than nothing; NaN stays what it is.
    std = math.sqrt(0.0 if variance < 0 else variance)
    return Spread(count=count, mean=mean, std=std, min=ends[0], max=ends[1])
