"""Tables in Markdown that line up in a terminal as well."""

import re
import unicodedata
from collections.abc import Sequence


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1
) -> str:
    """Return a table with text aligned to the left and numbers to the right.

    Args:
        header: The names of the columns.
        rows: A cell for each column; pipes in them are escaped, and lines are joined.
        text_columns: The number of columns at the beginning that hold text.
    """
    header, *rows = [[_cell(text) for text in cells] for cells in (header, *rows)]
    widths = [max(map(width_in_columns, column)) for column in zip(header, *rows, strict=True)]
    rule = [
        "-" * width if number < text_columns else "-" * (width - 1) + ":"
        for number, width in enumerate(widths)
    ]
    lines = []
    for cells in (header, rule, *rows):
        padded = [
            cell + space if number < text_columns else space + cell
            for number, (cell, space) in enumerate(zip(cells, _spaces(cells, widths), strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)


def width_in_columns(text: str) -> int:
    """Return the width of a text in a terminal, where a Chinese character takes two columns."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _cell(text: str) -> str:
    return re.sub(r"\s*[\r\n]\s*", " ", text).replace("|", "\\|")


def _spaces(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        " " * (width - width_in_columns(cell)) for cell, width in zip(cells, widths, strict=True)
    ]
