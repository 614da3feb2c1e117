"""The splits of a set: a style and some concepts are kept for testing, the same ones every time."""

import hashlib

TRAIN, VAL = "train", "val"
TEST_STYLE, TEST_NOVEL, TEST_NOVEL_STYLE = "test_style", "test_novel", "test_novel_style"
SPLITS = (TRAIN, VAL, TEST_STYLE, TEST_NOVEL, TEST_NOVEL_STYLE)

_VAL_PERCENT = 5


def split_of(style: str, key: str, *, new_style: bool, new_concept: bool) -> str:
    """Return the split of one image.

    Args:
        style: The image's drawing style.
        key: Its name within the style.
        new_style: Whether the style is held out.
        new_concept: Whether what it shows is held out.
    """
    if new_concept:
        return TEST_NOVEL_STYLE if new_style else TEST_NOVEL
    if new_style:
        return TEST_STYLE
    return VAL if int(digest(f"val{style}{key}"), 16) % 100 < _VAL_PERCENT else TRAIN


def digest(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal: an order and a choice that never change."""
    return hashlib.sha256(text.encode()).hexdigest()
