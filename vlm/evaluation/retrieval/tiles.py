"""Inner products of all rows of one array with all rows of another, tile by tile.

A tile's products are float32. Where one is too close to a threshold for float32 to decide,
`Tile.exact` gives the product in float64, rounded to float32, which is the same wherever the two
vectors stand and on every machine. A float32 matrix product alone does not even promise that equal
vectors get equal products.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64, Shaped
from torch import Tensor
from tqdm import tqdm

from vlm.distributed.groups import SINGLE, RankGroup
from vlm.errors import VlmError

_CPU_TILE, _GPU_TILE = 512, 4096  # on a CPU, a tile and its features stay in the cache of a core
_ROUNDING = 2.0**-24  # unit roundoff of float32: half the distance from 1 to the next number
_CHUNK = 2**17  # numbers converted to float64 at a time: 1 MiB
_MANY = 1 / 128  # of a tile's products: from here on, one float64 product of the tile is faster


@dataclass(frozen=True, slots=True)
class Tile:
    """The products of some rows of the left array with some rows of the right one."""

    rows: slice
    """Which rows of the left array."""
    columns: slice
    """Which rows of the right array."""
    products: Float32[Tensor, "rows columns"]
    """Overwritten by the next tile."""
    pairs: tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]
    """Rows and columns, within the tile, of the pairs that belong together."""
    left: Float32[Tensor, "rows dim"]
    right: Float32[Tensor, "columns dim"]

    @property
    def mirrored(self) -> "Tile":
        """The same products, with the sides exchanged."""
        return Tile(
            rows=self.columns,
            columns=self.rows,
            products=self.products.T,
            pairs=self.pairs[::-1],
            left=self.right,
            right=self.left,
        )

    def exact(
        self, rows: Int64[Tensor, " places"], columns: Int64[Tensor, " places"]
    ) -> Float32[Tensor, " places"]:
        """Return products computed in float64 and rounded to float32."""
        if len(rows) > _MANY * self.products.numel():
            return (self.left.double() @ self.right.double().T).float()[rows, columns]
        return _products_of(self.left[rows], self.right[columns])


class TiledProducts:
    """Two arrays of features whose products are wanted, and which of their rows belong together.

    The arguments, and what they raise, are those of `vlm.evaluation.retrieval.comparison.compare`.
    """

    def __init__(
        self,
        left: Float[np.ndarray, "left left_dim"],
        right: Float[np.ndarray, "right right_dim"],
        matches: Int[np.ndarray, "matches 2"],
        *,
        tile: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        default = _CPU_TILE if self.device.type == "cpu" else _GPU_TILE
        self.tile = default if tile is None else tile
        if left.shape[1] != right.shape[1] or self.tile < 1:
            raise VlmError(
                f"cannot compare vectors of width {left.shape[1]} with vectors of width "
                f"{right.shape[1]} in tiles of {self.tile}; expected one width and tiles of at "
                "least 1"
            )
        self._left, self._right = _as_tensor(left), _as_tensor(right)
        self.shape = (len(left), len(right))
        """Numbers of rows of the left and of the right array."""
        self.rows, self.columns = self._sorted_pairs(matches)
        """The pairs without repetitions: rows of the left and of the right array."""

    @cached_property
    def pair_products(self) -> Float32[Tensor, " pairs"]:
        """The products of the pairs that belong together, as exact as `Tile.exact`."""
        rows, columns = (places.to(self._left.device) for places in (self.rows, self.columns))
        step = max(1, _CHUNK // max(1, self._left.shape[1]))
        products = torch.empty(len(rows), device=self.device)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            products[part] = _products_of(
                self._left[rows[part]].to(self.device, torch.float32),
                self._right[columns[part]].to(self.device, torch.float32),
            )
        return products

    @cached_property
    def margin(self) -> float:
        """The most by which a product of a tile may differ from the exact one.

        A sum of `n` products, in whatever order, has a rounding error of at most about `n` times
        the unit roundoff times the sum of their absolute values, which is at most the product of
        both vectors' lengths (Cauchy-Schwarz; Higham, Accuracy and Stability of Numerical
        Algorithms, section 3.1).
        """
        left, right = _largest_length(self._left), _largest_length(self._right)
        most = left * right
        if most > 1e37:  # float32 ends at 3.4e38; sums of partial products need room
            raise VlmError(
                f"the longest vectors have lengths {left:.3g} and {right:.3g}, whose "
                "products do not fit into float32; expected unit vectors"
            )
        # 8 more roundings: of the exact product to float32, and of the bounds best +- margin. 1.01:
        # Higham's n u / (1 - n u), up to a width of 160,000.
        return 1.01 * (self._left.shape[1] + 8) * _ROUNDING * most

    def tiles(
        self, *, group: RankGroup = SINGLE, show_progress_bar: bool = False
    ) -> Iterator[Tile]:
        """Give this rank's tiles; the ranks of the group cover all tiles together.

        A band is one tile's rows of the left array with all of the right one. Ranks take bands in
        turn, so that a left row is seen by one rank alone, and its columns in rising order.
        """
        size = self.tile
        buffer = torch.empty(size * size, device=self.device)
        starts = range(0, self.shape[1], size)
        # Pairs are sorted by their tile: `bounds` is where those of each tile begin.
        numbers = self.rows // size * len(starts) + self.columns // size
        count = -(-self.shape[0] // size) * len(starts)
        bounds = np.searchsorted(numbers.cpu().numpy(), np.arange(count + 1))
        bands = range(group.rank * size, self.shape[0], group.size * size)
        for start in tqdm(bands, unit="band", desc="comparing", disable=not show_progress_bar):
            left = self._left[start : start + size].to(self.device, torch.float32)
            for place, begin in enumerate(starts):
                right = self._right[begin : begin + size].to(self.device, torch.float32)
                products = buffer[: len(left) * len(right)].view(len(left), len(right))
                with _whole_float32():
                    torch.mm(left, right.T, out=products)
                number = start // size * len(starts) + place
                own = slice(int(bounds[number]), int(bounds[number + 1]))
                yield Tile(
                    rows=slice(start, start + len(left)),
                    columns=slice(begin, begin + len(right)),
                    products=products,
                    pairs=(self.rows[own] - start, self.columns[own] - begin),
                    left=left,
                    right=right,
                )

    def _sorted_pairs(
        self, matches: Int[np.ndarray, "matches 2"]
    ) -> tuple[Int64[Tensor, " pairs"], Int64[Tensor, " pairs"]]:
        """Check the pairs, drop repetitions, and sort them by the tile in which they lie."""
        if len(matches) and (matches.min() < 0 or (matches.max(axis=0) >= self.shape).any()):
            raise VlmError(
                f"pairs name rows from {matches.min(axis=0).tolist()} to "
                f"{matches.max(axis=0).tolist()}; expected at least 0 and less than "
                f"{list(self.shape)}"
            )
        width = max(1, self.shape[1])
        keys = np.unique(matches[:, 0].astype(np.int64) * width + matches[:, 1])  # row-major places
        rows, columns = np.divmod(keys, width)
        # By band, then by tile within it: the order of `tiles`, so that a tile's pairs are a slice.
        order = np.lexsort((columns // self.tile, rows // self.tile))
        return (
            torch.from_numpy(rows[order]).to(self.device),
            torch.from_numpy(columns[order]).to(self.device),
        )


def _largest_length(features: Float[Tensor, "rows dim"]) -> float:
    """Return the length of the longest vector; those that are not finite do not count."""
    longest = 0.0
    step = max(1, _CHUNK // max(1, features.shape[1]))
    for start in range(0, len(features), step):
        lengths = torch.linalg.vector_norm(features[start : start + step].double(), dim=1)
        longest = max([longest, *lengths[lengths.isfinite()].tolist()])
    return longest


def _products_of(
    left: Float32[Tensor, "places dim"], right: Float32[Tensor, "places dim"]
) -> Float32[Tensor, " places"]:
    return (left.double() * right.double()).sum(1).float()


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Keep torch from rounding factors to TF32 or bfloat16, as a program may have allowed it to."""
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _as_tensor(array: Shaped[np.ndarray, "rows dim"]) -> Shaped[Tensor, "rows dim"]:
    """Share an array's memory with torch, which warns of arrays that must not be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array if min(array.strides) >= 0 else array.copy())
