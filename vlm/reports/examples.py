"""Examples of what a model answers: images found by texts, and captions found by images."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlm.images.decoding import ImageSource, decode_image

RIGHT_SIGN = "✓"
"""Stands beside right answers, for those who cannot tell their colour."""

RIGHT_IMAGE = "a right image"
"""What `Example.right` is called where it is shown."""

LEGEND = f"{RIGHT_SIGN} marks right answers; the small numbers are cosines."


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundImage:
    """One image that a query found."""

    image: ImageSource
    correct: bool
    """Whether it is known to be a right answer."""
    cosine: float | None = None
    """Of the query and the image; None leaves it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A query in one language and the images that it finds, best first."""

    language: str
    query: str
    found: Sequence[FoundImage]
    rank: int | None = None
    """Of the first right image, 1 the best; None where nobody knows what is right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """The same question in each language."""

    answers: Sequence[Answer]
    right: ImageSource | None = None
    """A right image to show after the answers, where they miss it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundCaption:
    """One caption that an image found."""

    text: str
    correct: bool
    """Whether it is known to be a right answer."""
    cosine: float | None = None
    """Of the image and the caption; None leaves it out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionAnswer:
    """The captions of one language that an image finds, best first."""

    language: str
    found: Sequence[FoundCaption]
    rank: int | None = None
    """Of the first right caption, 1 the best; None where nobody knows what is right."""
    what: str = "caption"
    """What the texts are called where the rank is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionExample:
    """An image, and the captions that it finds in each language."""

    image: ImageSource
    answers: Sequence[CaptionAnswer]


def thumbnail(image: ImageSource, *, side: int, file_format: Literal["PNG", "WEBP"]) -> bytes:
    """Return a small image file: at most `side` pixels wide and high, transparency on white.

    Raises:
        DataError: the image cannot be read.
    """
    small = decode_image(image)
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, file_format, **({"optimize": True} if file_format == "PNG" else {}))
    return buffer.getvalue()


def cosine_in_words(cosine: float | None) -> str:
    """Return a cosine as it is shown; nothing for None."""
    return "" if cosine is None else f"{cosine:.3f}"
