"""Which pairs of a block of similarities match, one tile at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from vlm.text.caption_ids import NO_CAPTION

Axis = TypeVar("Axis")

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
        """Return what belongs to the sides that have a loss, with their span and dimension.

        The dimension is the one to reduce over.
        """
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
    for first, last in ((0, scored), (scored, count)):
        for start in range(first, last, longest):
            yield slice(start, min(start + longest, last)), last <= scored


@dataclass(frozen=True, slots=True)
class OwnPairs:
    """Every sample matches itself alone: the diagonal of this rank's part of the block."""

    rows: slice
    """This rank's samples among the rows, and, as many of them, among the columns."""
    columns: slice

    def diagonal(
        self, values: Float[Tensor, "rows columns"], tile: Tile
    ) -> tuple[Float[Tensor, " pairs"], slice, slice]:
        """Return a view of the matching entries, and their rows and columns in the block."""
        offset = self.columns.start - self.rows.start
        first = max(tile.rows.start, tile.columns.start - offset, self.rows.start)
        last = min(tile.rows.stop, tile.columns.stop - offset, self.rows.stop)
        rows = slice(first, max(first, last))
        columns = slice(first + offset, max(first, last) + offset)
        inside = values[
            first - tile.rows.start : rows.stop - tile.rows.start,
            columns.start - tile.columns.start : columns.stop - tile.columns.start,
        ]
        return inside.diagonal(), rows, columns


@dataclass(frozen=True, slots=True)
class SharedIds:
    """Samples match that have the same concept or a caption in common.

    An id table has a row for each sample: its number in the group, its image id, then the ids of
    its captions, `NO_CAPTION` where one is missing.
    """

    rows: Int64[Tensor, "rows ids"]
    columns: Int64[Tensor, "columns other_ids"]
    duplicates: Literal["positive", "ignore"]

    def __post_init__(self) -> None:
        """Make missing captions differ from each other."""
        object.__setattr__(self, "rows", self.rows.masked_fill(self.rows == NO_CAPTION, _NOTHING))

    def masks(
        self, tile: Tile
    ) -> tuple[Bool[Tensor, "rows columns"], Bool[Tensor, "rows columns"] | None]:
        """Return which pairs of a tile match, and which are neither positive nor negative."""
        rows, columns = self.rows[tile.rows], self.columns[tile.columns]
        same = rows[:, None, 1] == columns[None, :, 1]
        for ids in rows[:, 2:].T:
            for others in columns[:, 2:].T:
                same |= ids[:, None] == others[None, :]
        if self.duplicates == "positive":
            return same, None
        own = rows[:, None, 0] == columns[None, :, 0]
        return own, same & ~own
