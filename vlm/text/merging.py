"""What byte-pair merging goes through on its way to a piece."""

from collections.abc import Callable, Iterable
from itertools import pairwise


def merged_to(symbols: Iterable[str], place_of: Callable[[str, str], float | None]) -> list[str]:
    """Return what the symbols of one piece are merged to, one after the other.

    What is merged to a piece within a text is merged in the same order within the piece alone,
    because no merge that crossed its edges was made.

    Args:
        symbols: What the piece is first split into.
        place_of: Place of a merge in the order of merges, the least first; None if there is none.
    """
    row = list(symbols)
    made: list[str] = []
    while True:
        places = [
            (place, index)
            for index, (left, right) in enumerate(pairwise(row))
            if (place := place_of(left, right)) is not None
        ]
        if not places:
            return made
        _, index = min(places)
        row[index : index + 2] = [row[index] + row[index + 1]]
        made.append(row[index])
