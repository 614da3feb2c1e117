"""Which pairs of a block of similarities match, one tile at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vlm.losses.axis import AxisStatistics
from vlm.text.caption_ids import NO_CAPTION

Axis = TypeVar("Axis")

# Columns of an id table, which has one row a sample: its number, its image id, then caption ids.
SAMPLE, IMAGE, FIRST_CAPTION = 0, 1, 2

# In place of NO_CAPTION among the rows, so that two missing captions are not the same caption.
_NOTHING = torch.iinfo(torch.int64).min


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of a block: some of its rows against some of its columns."""

    rows: slice
    columns: slice
    rows_scored: bool
    """Whether its rows have a loss; otherwise they are candidates for the columns only."""
    columns_scored: bool

    def scored(self, of_rows: Axis, of_columns: Axis) -> list[tuple[Axis, slice, int]]:
        """Return what belongs to the sides with a loss, their span, and over what to reduce."""
        # Rows are reduced over dimension 1, which is the columns, and the other way round.
        sides = []
        if self.rows_scored:
            sides.append((of_rows, self.rows, 1))
        if self.columns_scored:
            sides.append((of_columns, self.columns, 0))
        return sides


def tiles(shape: tuple[int, int], scored: tuple[int, int], tile: tuple[int, int]) -> Iterator[Tile]:
    """Yield the tiles of a block in a fixed order, without those in which nothing is scored.

    Args:
        shape: Rows and columns of the block.
        scored: How many of them, from the first, have a loss of their own.
        tile: The most rows and columns of a tile.
    """
    for rows, rows_scored in _spans(shape[0], scored[0], tile[0]):
        for columns, columns_scored in _spans(shape[1], scored[1], tile[1]):
            if rows_scored or columns_scored:
                yield Tile(rows, columns, rows_scored, columns_scored)


def _spans(count: int, scored: int, longest: int) -> Iterator[tuple[slice, bool]]:
    # No tile has scored and other rows in it, so that one flag says what it adds to.
    for first, last in ((0, scored), (scored, count)):
        for start in range(first, last, longest):
            yield slice(start, min(start + longest, last)), last <= scored


@dataclass(frozen=True, slots=True)
class OwnPairs:
    """Every sample matches itself alone: the diagonal of this rank's part of the block."""

    by_ids: ClassVar[bool] = False

    rows: slice
    """This rank's samples among the rows, and, as many of them, among the columns."""
    columns: slice

    def diagonal(
        self, values: Float[Tensor, "rows columns"], tile: Tile
    ) -> tuple[Float[Tensor, " pairs"], slice, slice]:
        """Return a view of the matching entries, and their rows and columns in the block."""
        # A pair lies at (row, row + offset) of the block.
        offset = self.columns.start - self.rows.start
        first = max(tile.rows.start, tile.columns.start - offset, self.rows.start)
        last = min(tile.rows.stop, tile.columns.stop - offset, self.rows.stop)
        rows = slice(first, max(first, last))  # empty where the tile has no pair
        columns = slice(first + offset, max(first, last) + offset)
        inside = values[
            first - tile.rows.start : rows.stop - tile.rows.start,
            columns.start - tile.columns.start : columns.stop - tile.columns.start,
        ]
        return inside.diagonal(), rows, columns

    def add_to(
        self,
        rows: AxisStatistics,
        columns: AxisStatistics,
        logits: Float[Tensor, "rows columns"],
        tile: Tile,
        bias: Float[Tensor, ""] | None = None,
    ) -> Bool[Tensor, "rows columns"] | None:
        """Add a tile's positive pairs to the statistics, as `SharedIds.add_to` does."""
        values, own_rows, own_columns = self.diagonal(logits, tile)
        for axis, span in ((rows, own_rows), (columns, own_columns)):
            axis.positive_sum[span] = values if bias is None else values + bias
        return None

    def subtract_from_(
        self,
        weights: Float[Tensor, "rows columns"],
        tile: Tile,
        row_weight: Float[Tensor, " block_rows"],
        column_weight: Float[Tensor, " block_columns"],
    ) -> None:
        """Subtract its row's and its column's weight from the tile's entry of each positive."""
        values, own_rows, own_columns = self.diagonal(weights, tile)
        # A view, so that this changes the tile.
        values -= row_weight[own_rows] + column_weight[own_columns]


@dataclass(frozen=True, slots=True)
class SharedIds:
    """Samples match that have the same concept or a caption in common.

    An id table has a row for each sample: its number in the group, its image id, then the ids of
    its captions, `NO_CAPTION` where one is missing.
    """

    by_ids: ClassVar[bool] = True

    rows: Int64[Tensor, "rows ids"]
    columns: Int64[Tensor, "columns other_ids"]
    duplicates: Literal["positive", "ignore"]

    def __post_init__(self) -> None:
        # On one side only: two missing captions, here -1 and there another number, never match.
        object.__setattr__(self, "rows", self.rows.masked_fill(self.rows == NO_CAPTION, _NOTHING))

    def masks(
        self, tile: Tile
    ) -> tuple[Bool[Tensor, "rows columns"], Bool[Tensor, "rows columns"] | None]:
        """Return which pairs of a tile match, and which are neither positive nor negative."""
        rows, columns = self.rows[tile.rows], self.columns[tile.columns]
        # Compared pair by pair, caption by caption: the tile is small, and a sort would wait.
        same = rows[:, None, IMAGE] == columns[None, :, IMAGE]
        for ids in rows[:, FIRST_CAPTION:].T:
            for others in columns[:, FIRST_CAPTION:].T:
                same |= ids[:, None] == others[None, :]
        if self.duplicates == "positive":
            return same, None
        # By its number, since a sample's own pair lies wherever its column came to lie.
        own = rows[:, None, SAMPLE] == columns[None, :, SAMPLE]
        return own, same & ~own

    def add_to(
        self,
        rows: AxisStatistics,
        columns: AxisStatistics,
        logits: Float[Tensor, "rows columns"],
        tile: Tile,
        bias: Float[Tensor, ""] | None = None,
    ) -> Bool[Tensor, "rows columns"] | None:
        """Add a tile's positive pairs to the statistics of the block's rows and columns.

        Args:
            rows: Statistics of the block's rows.
            columns: Statistics of its columns.
            logits: The tile, without its bias.
            tile: Where it lies.
            bias: Of all logits.

        Returns:
            Which pairs are neither positive nor negative; None if duplicates are positives.
        """
        positive, ignored = self.masks(tile)
        if logits.is_cuda or positive.any():  # on a GPU, asking would mean waiting for it
            whole = logits if bias is None else logits + bias
            values = torch.where(positive, whole, 0)
            best = torch.where(positive, whole, torch.finfo(logits.dtype).min)
            for axis, span, dim in tile.scored(rows, columns):
                assert axis.positive_count is not None
                assert axis.positive_max is not None
                axis.positive_sum[span] += values.sum(dim)
                axis.positive_count[span] += positive.sum(dim)
                axis.positive_max[span] = torch.maximum(axis.positive_max[span], best.amax(dim))
        for axis, span, dim in tile.scored(rows, columns):
            if ignored is not None and axis.ignored is not None:
                axis.ignored[span] += ignored.sum(dim)
        return ignored

    def subtract_from_(
        self,
        weights: Float[Tensor, "rows columns"],
        tile: Tile,
        row_weight: Float[Tensor, " block_rows"],
        column_weight: Float[Tensor, " block_columns"],
    ) -> None:
        """Subtract its row's and its column's weight from the tile's entry of each positive."""
        positive, ignored = self.masks(tile)
        if ignored is not None:
            # Logits that were computed again, and label smoothing, know nothing of these.
            weights.masked_fill_(ignored, 0)
        if weights.is_cuda or positive.any():
            targets = row_weight[tile.rows, None] + column_weight[None, tile.columns]
            weights.addcmul_(positive.to(weights.dtype), targets, value=-1)
