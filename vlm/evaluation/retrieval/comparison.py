"""All texts compared with all images in one pass: exact ranks, first images, cosine statistics.

The score of a pair is the inner product of its vectors, computed in float64 and rounded to
float32. Nearly all comparisons are decided by float32 products, whose error is bounded; only those
within the bound are decided by exact ones (`vlm.evaluation.retrieval.tiles`). Ranks and first
images are therefore the same for every tile size, number of processes and device, and equal
vectors tie. The matrix of all products is never held.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Float32, Int, Int64
from numpy.typing import NDArray
from torch import Tensor

from vlm.distributed.groups import SINGLE, RankGroup
from vlm.evaluation.retrieval.metrics import NOT_FOUND, Ranks
from vlm.evaluation.retrieval.tiles import Tile, TiledProducts


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Statistics of some numbers; all but the count are NaN if there are none."""

    count: int
    mean: float
    std: float
    """The population's: the root of the mean squared deviation."""
    min: float
    max: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineStatistics:
    """The cosines of texts with images; times the model's scale they are its logits."""

    correct: Spread
    """Of the pairs that belong together."""
    wrong: Spread
    """Of all other pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What all products of one language's texts with the images say."""

    text_to_image: Int64[np.ndarray, " texts"]
    """For each text, the rank of its best correct image, from 1; `NOT_FOUND` if it has none."""
    image_to_text: Int64[np.ndarray, " images"]
    """For each image, the rank of its best correct text."""
    first_image: Int64[np.ndarray, " texts"]
    """For each text, the image with the highest product, the first of several; -1 if all products
    are NaN or minus infinity."""
    cosines: CosineStatistics

    @property
    def ranks(self) -> Ranks:
        """By direction; an image without a correct text is no query."""
        image_to_text = self.image_to_text[self.image_to_text != NOT_FOUND]
        return {"text_to_image": self.text_to_image, "image_to_text": image_to_text}


@torch.inference_mode()
def compare(
    texts: Float[np.ndarray, "texts text_dim"],
    images: Float[np.ndarray, "images image_dim"],
    matches: Int[np.ndarray, "matches 2"],
    *,
    tile: int | None = None,
    device: str | torch.device | None = None,
    group: RankGroup = SINGLE,
    show_progress_bar: bool = False,
) -> Comparison:
    """Compare every text with every image, once.

    A wrong answer that scores as high as the best correct one is ranked before it, and a NaN
    scores minus infinity, as in `vlm.evaluation.retrieval.metrics.first_correct_ranks`. Memory
    beyond the features is a few tiles.

    Args:
        texts: Vectors of float16, float32 or float64, which are rounded to float32; arrays
            that are memory-mapped are read a tile at a time.
        images: Vectors of the same width.
        matches: Pairs (text, image) that belong together; repetitions count once.
        tile: Texts and images in a tile; None for what suits the device.
        device: Where to multiply, a CPU or a CUDA device; None for a GPU if there is one.
        group: Ranks that share the work; each must call this with the same arguments, and gets
            the whole.
        show_progress_bar: Whether to show progress on stderr.

    Raises:
        VlmError: the widths differ, a pair names a vector that does not exist, the tile is less
            than 1, or products might not fit into float32.
    """
    products = TiledProducts(texts, images, matches, tile=tile, device=device)
    first, ranks, cosines = _FirstImages(products), _Ranks(products), _Cosines(products)
    for each in products.tiles(group=group, show_progress_bar=show_progress_bar):
        first.add(each)  # reads the products as they are
        ranks.add(each)  # overwrites those of correct pairs
        cosines.add(each)  # overwrites all
    text_to_image, image_to_text = ranks.of_group(group)
    return Comparison(
        text_to_image=text_to_image,
        image_to_text=image_to_text,
        first_image=first.of_group(group).cpu().numpy(),
        cosines=cosines.of_group(group),
    )


class _FirstImages:
    """The image with the highest exact product of each text."""

    def __init__(self, products: TiledProducts) -> None:
        texts = products.shape[0]
        self.best = torch.full((texts,), -torch.inf, device=products.device)
        self.found = torch.full((texts,), -1, dtype=torch.int64, device=products.device)
        # Of two equal exact products, one may be rounded up and the other down by the margin.
        self.slack = 2 * products.margin

    def add(self, tile: Tile) -> None:
        best = self.best[tile.rows]
        products = tile.products
        highest = products.amax(1)
        if not bool(highest.isfinite().all()):  # amax of a row with a NaN is NaN
            products = products.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            highest = products.amax(1)
        # After the first tiles, few texts can still find a better image: only their rows are read.
        hopeful = ((highest >= best - self.slack) & (highest > -torch.inf)).nonzero().flatten()
        bar = torch.maximum(best, highest)[hopeful] - self.slack
        near = products[hopeful]
        places, columns = ((near >= bar[:, None]) & (near > -torch.inf)).nonzero(as_tuple=True)
        rows = hopeful[places]
        exact = tile.exact(rows, columns)
        top = torch.full_like(best, -torch.inf).scatter_reduce(0, rows, exact, "amax")
        ties = exact == top[rows]
        first = rows.new_full((len(best),), products.shape[1])
        first = first.scatter_reduce(0, rows[ties], columns[ties], "amin")
        better = top > best  # not >=: tiles come in the order of images, so the first image stays
        self.best[tile.rows][better] = top[better]
        self.found[tile.rows][better] = first[better] + tile.columns.start

    def of_group(self, group: RankGroup) -> Int64[Tensor, " texts"]:
        if group.size > 1:  # each text was looked at by one rank, and is -1 on all others
            dist.all_reduce(self.found, dist.ReduceOp.MAX, group=group.process_group)
        return self.found


class _Ranks:
    """Counts the wrong answers no worse than the best correct one, of each text and image."""

    def __init__(self, products: TiledProducts) -> None:
        scores = products.pair_products
        scores = torch.where(scores.isnan(), -torch.inf, scores)
        self.sides = (products.rows, products.columns)  # of each pair, its text and its image
        self.shape, self.margin = products.shape, products.margin
        self.best = [
            torch.full((count,), -torch.inf, device=products.device).scatter_reduce(
                0, of_pair, scores, "amax"
            )
            for of_pair, count in zip(self.sides, products.shape, strict=True)
        ]
        self.before = [torch.zeros_like(bar, dtype=torch.int64) for bar in self.best]
        self.scratch = torch.empty(products.tile**2, device=products.device)

    def add(self, tile: Tile) -> None:
        tile.products[tile.pairs] = torch.nan  # never >=: correct answers are not counted
        flags = self.scratch[: tile.products.numel()].view_as(tile.products)
        mirrored = tile.mirrored
        self.before[0][tile.rows] += self._not_below(tile, self.best[0][tile.rows], flags)
        self.before[1][tile.columns] += self._not_below(
            mirrored, self.best[1][tile.columns], flags.T
        )

    def of_group(self, group: RankGroup) -> list[NDArray[np.int64]]:
        ranks = []
        for side, candidates in enumerate(reversed(self.shape)):
            before, best = self.before[side], self.best[side]
            if group.size > 1:
                dist.all_reduce(before, group=group.process_group)
            correct = torch.bincount(self.sides[side], minlength=len(before))
            # Where the best correct score is minus infinity (or NaN), so is every score at least;
            # NaN was never counted, hence all wrong candidates are.
            before = torch.where(best == -torch.inf, candidates - correct, before)
            found: NDArray[np.int64] = torch.where(correct > 0, before + 1, NOT_FOUND).cpu().numpy()
            ranks.append(found)
        return ranks

    def _not_below(
        self,
        tile: Tile,
        best: Float32[Tensor, " queries"],
        flags: Float32[Tensor, "queries candidates"],
    ) -> Int64[Tensor, " queries"]:
        """Count in each row of a tile the products no less than its best; NaN is less.

        A product of the tile is within `margin` of the exact one. At best + margin or above it is
        surely no less than best, below best - margin surely less; the few in between are decided
        by their exact products. `flags` is memory to use: summing 0.0 and 1.0 in float32 is
        faster than summing booleans, and exact up to 2**24 candidates a tile.
        """
        low, high = best - self.margin, best + self.margin
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


class _Cosines:
    """Sums, in float64, and extremes of the wrong pairs' products; of the correct ones, all."""

    def __init__(self, products: TiledProducts) -> None:
        self.correct = products.pair_products.double()
        self.wrong = math.prod(products.shape) - len(self.correct)
        self.sums = torch.zeros(2, dtype=torch.float64, device=products.device)
        self.extremes = torch.full((2,), -torch.inf, device=products.device)
        """The greatest of the negated products, and of the products."""

    def add(self, tile: Tile) -> None:
        products, pairs = tile.products, tile.pairs
        for place, sign in enumerate((-1, 1)):
            products[pairs] = -sign * torch.inf  # a correct pair is never the extreme
            extreme = products.min() if sign < 0 else products.max()
            self.extremes[place] = torch.maximum(self.extremes[place], sign * extreme)
        products[pairs] = 0
        self.sums[0] += products.sum(dtype=torch.float64)
        self.sums[1] += products.square_().sum(dtype=torch.float64)

    def of_group(self, group: RankGroup) -> CosineStatistics:
        if group.size > 1:
            dist.all_reduce(self.sums, group=group.process_group)
            dist.all_reduce(self.extremes, dist.ReduceOp.MAX, group=group.process_group)
        own = self.correct
        ends = [float(own.min()), float(own.max())] if len(own) else []
        return CosineStatistics(
            correct=_spread(len(own), [own.sum(), own.square().sum()], ends),
            wrong=_spread(
                self.wrong, list(self.sums), [-float(self.extremes[0]), float(self.extremes[1])]
            ),
        )


def _spread(count: int, sums: Sequence[Tensor], ends: Sequence[float]) -> Spread:
    """Summarise numbers by their sum, the sum of their squares, the least and the greatest."""
    if count == 0:
        return Spread(count=0, mean=math.nan, std=math.nan, min=math.nan, max=math.nan)
    mean, mean_square = (float(total) / count for total in sums)
    variance = mean_square - mean**2
    # Rounding may leave slightly less than 0; max() would turn NaN into 0.
    std = math.sqrt(0.0 if variance < 0 else variance)
    return Spread(count=count, mean=mean, std=std, min=ends[0], max=ends[1])
