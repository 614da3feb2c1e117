"""A rank's block of similarities: what lies where, and the memory to compute it in tiles."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.distributed.mesh import RankMesh
from vlm.losses.axis import AxisLayout, AxisStatistics
from vlm.losses.kernels import scaled_product
from vlm.losses.matches import OwnPairs, SharedIds, Tile, tiles
from vlm.losses.plan import LossPlan


@dataclass(frozen=True, slots=True)
class Block:
    """All that computing a rank's block needs besides features, scale and bias."""

    mesh: RankMesh
    plan: LossPlan
    rows: AxisLayout
    columns: AxisLayout
    matches: OwnPairs | SharedIds
    product_dtype: torch.dtype
    """In which features are multiplied; sums are in the features' own type."""

    @property
    def group_size(self) -> int:
        """Ranks that contrast with each other."""
        return self.mesh.rows * self.mesh.columns

    def statistics(self, like: Tensor) -> tuple[AxisStatistics, AxisStatistics]:
        """Return empty statistics of the rows and of the columns."""
        rows, columns = (
            AxisStatistics(
                layout,
                opposite.candidates,
                like,
                softmax=self.plan.kind == "softmax",
                smoothing=self.plan.label_smoothing,
                by_ids=self.matches.by_ids,
                ignoring=self.matches.by_ids and self.plan.duplicates == "ignore",
            )
            for layout, opposite in ((self.rows, self.columns), (self.columns, self.rows))
        )
        return rows, columns

    def tiles(self, rows: Tensor, columns: Tensor) -> Iterator[Tile]:
        """Yield the tiles in which something is scored, always in the same order."""
        # A fixed order: float sums depend on it, and the same inputs shall give the same bits.
        shape = self.plan.tile_shape(rows.device.type)
        return tiles((len(rows), len(columns)), (self.rows.scored, self.columns.scored), shape)


class TileBuffer:
    """Memory for one tile of similarities and one to work in, used again for the next.

    On a CPU fresh memory costs more than most of what is done with it.
    """

    def __init__(self, like: Tensor) -> None:
        self._memory, self._scratch = like.new_empty(0), like.new_empty(0)

    def similarities(
        self,
        rows: Float[Tensor, "rows dim"],
        columns: Float[Tensor, "columns dim"],
        scale: float,
        dtype: torch.dtype,
    ) -> Float[Tensor, "rows columns"]:
        """Return all inner products times `scale`, multiplied in `dtype`, until the next call."""
        size = len(rows) * len(columns)
        # The first tile is the largest but where scored and unscored parts differ.
        if len(self._memory) < size:
            self._memory = self._memory.new_empty(size)
        out = self._memory[:size].view(len(rows), len(columns))
        return scaled_product(rows, columns, scale, out, dtype)

    def scratch(self, tile: Tensor) -> Tensor | None:
        """Return memory of the tile's size; None on a GPU, where kernels bring their own."""
        if tile.is_cuda:
            return None
        if len(self._scratch) < tile.numel():
            self._scratch = self._scratch.new_empty(tile.numel())
        return self._scratch[: tile.numel()].view_as(tile)

    def give_away(self) -> None:
        """Leave the memory to whoever keeps the last tile."""
        self._memory = self._memory.new_empty(0)


def refuse_second_derivative() -> None:
    """Raise NotImplementedError in a backward pass that is itself to be differentiated."""
    # Autograd enables gradients inside backward for create_graph alone.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "the contrastive loss can be differentiated once; expected create_graph=False"
        )
