"""Which split an image belongs to: a style and some families of concepts are kept for testing."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable

from tools.emoji.concepts import Concept, family_of

TRAIN, VAL = "train", "val"
TEST_STYLE, TEST_NOVEL, TEST_NOVEL_STYLE = "test_style", "test_novel", "test_novel_style"
SPLITS = (TRAIN, VAL, TEST_STYLE, TEST_NOVEL, TEST_NOVEL_STYLE)

HELD_OUT_STYLE = "noto"

_HELD_OUT_FRACTION = 0.12
_VAL_PERCENT = 5
# Nothing in the image of an unseen flag or boxed letter tells its name.
_NEVER_HELD_OUT = frozenset({"flags", "symbols"})


def held_out_concepts(concepts: Iterable[Concept]) -> frozenset[str]:
    """Return the keys of the concepts that no training image may show.

    Whole families are held out, the same share of every subgroup; a family that reaches into
    several subgroups is decided once, in the first of them by name.
    """
    eligible = [concept for concept in concepts if concept.group not in _NEVER_HELD_OUT]
    families_by_subgroup: defaultdict[str, set[str]] = defaultdict(set)
    for concept in eligible:
        families_by_subgroup[concept.subgroup].add(family_of(concept.key))
    decided: set[str] = set()
    held_out: set[str] = set()
    for _, families in sorted(families_by_subgroup.items()):
        undecided = sorted(families - decided, key=lambda family: _digest(f"novel{family}"))
        decided.update(undecided)
        held_out.update(undecided[: round(_HELD_OUT_FRACTION * len(undecided))])
    return frozenset(concept.key for concept in eligible if family_of(concept.key) in held_out)


def split_of(style: str, key: str, *, held_out: frozenset[str]) -> str:
    """Return the split of one image, given the keys of the held-out concepts."""
    if key in held_out:
        return TEST_NOVEL_STYLE if style == HELD_OUT_STYLE else TEST_NOVEL
    if style == HELD_OUT_STYLE:
        return TEST_STYLE
    return VAL if int(_digest(f"val{style}{key}"), 16) % 100 < _VAL_PERCENT else TRAIN


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
