"""A contact sheet: queries with the pictures they found, as one SVG file.

SVG leaves the drawing of text to the viewer, who has Chinese letters even where the machine that
trained the model has no font for them.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from vlm.images.decoding import decode_image

_PICTURE, _GAP, _LABEL, _MARGIN = 64, 8, 170, 16
_RIGHT, _OTHER = "#1a9641", "#dddddd"


@dataclass(frozen=True, slots=True)
class FoundPicture:
    """One picture that a query found."""

    image: bytes
    correct: bool
    """Whether it is known to be a right answer."""


@dataclass(frozen=True, slots=True)
class SheetRow:
    """The same question in each language, with its answers, best first."""

    queries: Sequence[tuple[str, Sequence[FoundPicture]]]


def contact_sheet_svg(rows: Sequence[SheetRow], *, title: str) -> str:
    """Return the sheet: a row a question, a block a language; right answers have a green frame."""
    blocks = max(len(row.queries) for row in rows)
    shown = max(len(found) for row in rows for _, found in row.queries)
    block_width = _LABEL + shown * (_PICTURE + _GAP) + 2 * _GAP
    row_height = _PICTURE + 2 * _GAP
    width, top = 2 * _MARGIN + blocks * block_width, _MARGIN + 36
    height = top + len(rows) * row_height + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="15">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN + 12}" font-size="17">{escape(title)}</text>',
    ]
    for number, row in enumerate(rows):
        for block, (query, found) in enumerate(row.queries):
            x, y = _MARGIN + block * block_width, top + number * row_height
            parts += _query_block(x, y, query, found)
    return "\n".join([*parts, "</svg>", ""])


def _query_block(x: int, y: int, query: str, found: Sequence[FoundPicture]) -> list[str]:
    label = query if len(query) <= 20 else query[:19] + "…"
    parts = [f'<text x="{x}" y="{y + _PICTURE // 2 + 5}">{escape(label)}</text>']
    for place, picture in enumerate(found):
        left = x + _LABEL + place * (_PICTURE + _GAP)
        parts.append(
            f'<image x="{left}" y="{y}" width="{_PICTURE}" height="{_PICTURE}" '
            f'href="data:image/png;base64,{_as_png(picture.image)}"/>'
        )
        colour, stroke = (_RIGHT, 3) if picture.correct else (_OTHER, 1)
        parts.append(
            f'<rect x="{left - 2}" y="{y - 2}" width="{_PICTURE + 4}" height="{_PICTURE + 4}" '
            f'fill="none" stroke="{colour}" stroke-width="{stroke}"/>'
        )
    return parts


def _as_png(image: bytes) -> str:
    """Return a small PNG as base64: every SVG viewer shows PNG, few show WebP."""
    picture = decode_image(image)
    picture.thumbnail((_PICTURE, _PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
