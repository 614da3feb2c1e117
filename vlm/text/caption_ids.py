"""Integers that are equal where two captions, or two concepts, are the same."""

import hashlib
import unicodedata

NO_CAPTION = -1
"""Id of a caption that is not there; `text_id` never returns it."""


def text_id(text: str) -> int:
    """Return a number in [0, 2**63) for a text, alike on every machine.

    Case, width and spacing do not count: `Cat` and `ｃａｔ ` are the same caption.
    """
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    digest = hashlib.blake2b(normalised.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
