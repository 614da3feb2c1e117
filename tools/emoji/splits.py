"""What the emoji set keeps for testing: a style and some families of concepts."""

from collections import defaultdict
from collections.abc import Iterable

from tools.emoji.concepts import Concept, family_of
from tools.splits import digest

HELD_OUT_STYLE = "noto"

_HELD_OUT_FRACTION = 0.12
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
        undecided = sorted(families - decided, key=lambda family: digest(f"novel{family}"))
        decided.update(undecided)
        held_out.update(undecided[: round(_HELD_OUT_FRACTION * len(undecided))])
    return frozenset(concept.key for concept in eligible if family_of(concept.key) in held_out)
