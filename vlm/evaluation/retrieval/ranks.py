"""Exact ranks of correct answers among all candidates, without the matrix of all similarities.

The score of a pair is the inner product of its vectors, computed in float64 and rounded to
float32. Nearly all comparisons are decided by float32 products, of which a bound of the error is
known; those that are within it of the best correct score are decided by the exact ones
(`vlm.evaluation.retrieval.tiles`). Ranks are therefore the same for every size of tiles, number of
processes and device, and equal vectors tie.
"""

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Float32, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from vlm.distributed.groups import SINGLE, RankGroup
from vlm.evaluation.retrieval.metrics import NOT_FOUND
from vlm.evaluation.retrieval.tiles import Tile, TiledProducts


def exact_ranks(
    queries: Float[np.ndarray, "queries query_dim"],
    candidates: Float[np.ndarray, "candidates candidate_dim"],
    matches: Int[np.ndarray, "matches 2"],
    *,
    tile: int | None = None,
    device: str | torch.device | None = None,
    group: RankGroup | None = None,
    show_progress_bar: bool = False,
) -> NDArray[np.int64]:
    """Return the rank of each query's best correct answer among all candidates, from 1.

    A wrong answer that scores as high as the best correct one is ranked before it, and what is
    no number scores minus infinity, as in
    `vlm.evaluation.retrieval.metrics.first_correct_ranks`. Memory
    beyond the features is a few tiles.

    Args:
        queries: Vectors of float16, float32 or float64, which are rounded to float32; arrays
            that are memory-mapped are read a tile at a time.
        candidates: Vectors of the same width.
        matches: Pairs (query, candidate) that are correct; repetitions count once.
        tile: Queries and candidates in a tile; None for what suits the device.
        device: Where to multiply, a CPU or a CUDA device; None for a GPU if there is one.
        group: Ranks that share the work; each must call this with the same arguments, and gets
            all ranks. None for this process alone.
        show_progress_bar: Whether to show progress on stderr.

    Returns:
        The ranks; `NOT_FOUND` for queries without a correct answer.

    Raises:
        VlmError: the widths differ, a pair names a vector that is not there, the tile is less
            than 1, or products might not fit into float32.
    """
    products = TiledProducts(queries, candidates, matches, tile=tile, device=device)
    return _ranks(products, group or SINGLE, both=False, show_progress_bar=show_progress_bar)[0]


def exact_ranks_both(
    texts: Float[np.ndarray, "texts text_dim"],
    images: Float[np.ndarray, "images image_dim"],
    matches: Int[np.ndarray, "matches 2"],
    *,
    tile: int | None = None,
    device: str | torch.device | None = None,
    group: RankGroup | None = None,
    show_progress_bar: bool = False,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ranks of both directions, text to image and image to text, from one pass.

    Args:
        texts: Vectors, as for `exact_ranks`.
        images: Vectors of the same width.
        matches: Pairs (text, image) that belong together.
        tile: As for `exact_ranks`, like all that follow.
        device: Where to multiply.
        group: Ranks that share the work.
        show_progress_bar: Whether to show progress on stderr.

    Returns:
        A rank for each text among the images, and a rank for each image among the texts.

    Raises:
        VlmError: as `exact_ranks`.
    """
    products = TiledProducts(texts, images, matches, tile=tile, device=device)
    text_to_image, image_to_text = _ranks(
        products, group or SINGLE, both=True, show_progress_bar=show_progress_bar
    )
    return text_to_image, image_to_text


@torch.inference_mode()
def _ranks(
    products: TiledProducts, group: RankGroup, *, both: bool, show_progress_bar: bool
) -> list[NDArray[np.int64]]:
    """Return the ranks of the rows' best pairs and, for `both`, of the columns'."""
    scores = products.pair_products()
    scores = torch.where(scores.isnan(), -torch.inf, scores)  # what is no number is no better
    owners = [products.rows, products.columns][: 1 + both]
    best = [
        torch.full((count,), -torch.inf, device=products.device).scatter_reduce(
            0, of_pair, scores, "amax"
        )
        for of_pair, count in zip(owners, products.shape, strict=False)
    ]
    before = [torch.zeros(len(bar), dtype=torch.int64, device=products.device) for bar in best]
    margin = products.margin()
    scratch = torch.empty(products.tile**2, device=products.device)
    for tile in products.tiles(group=group, show_progress_bar=show_progress_bar, purpose="ranking"):
        tile.products[tile.pairs] = torch.nan  # a correct answer is not before another one
        flags = scratch[: tile.products.numel()].view_as(tile.products)
        before[0][tile.rows] += _not_below(tile, best[0][tile.rows], margin, flags)
        if both:
            mirrored = tile.mirrored
            before[1][mirrored.rows] += _not_below(
                mirrored, best[1][mirrored.rows], margin, flags.T
            )
    if group.size > 1:
        for counts in before:
            dist.all_reduce(counts, group=group.process_group)
    sizes = products.shape[::-1]
    return [_as_ranks(*of_side) for of_side in zip(before, best, owners, sizes, strict=False)]


def _not_below(
    tile: Tile,
    best: Float32[Tensor, " queries"],
    margin: float,
    flags: Float32[Tensor, "queries candidates"],
) -> Int64[Tensor, " queries"]:
    """Count for each row of a tile the products that are no less than its best; NaN is less.

    Args:
        tile: Products with an error of up to `margin`.
        best: Exact scores.
        margin: Bound of the error.
        flags: Memory to use; sums of floats are quicker than of truth values.
    """
    low, high = best - margin, best + margin
    surely = torch.ge(tile.products, high[:, None], out=flags).sum(1)
    perhaps = torch.ge(tile.products, low[:, None], out=flags).sum(1)
    counts = surely.long()
    unsure = (perhaps != surely).nonzero().flatten()
    if len(unsure):
        products = tile.products[unsure]
        near = (products >= low[unsure, None]) & (products < high[unsure, None])
        places, columns = near.nonzero(as_tuple=True)
        rows = unsure[places]
        reached = rows[tile.exact(rows, columns) >= best[rows]]
        counts += torch.bincount(reached, minlength=len(counts))
    return counts


def _as_ranks(
    before: Int64[Tensor, " queries"],
    best: Float32[Tensor, " queries"],
    owners: Int64[Tensor, " pairs"],
    candidates: int,
) -> NDArray[np.int64]:
    """Turn numbers of wrong answers before the best correct ones into ranks."""
    correct = torch.bincount(owners, minlength=len(before))
    # No wrong answer is below minus infinity, not even one that is no number.
    ranks = torch.where(best == -torch.inf, candidates - correct, before) + 1
    found: NDArray[np.int64] = torch.where(correct > 0, ranks, NOT_FOUND).cpu().numpy()
    return found
