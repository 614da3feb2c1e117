"""Which samples are meant: conditions on their source, concept, labels and languages."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray

from vlm.errors import DataError

_COLUMNS = ("source", "concept", "languages")


class Condition(NamedTuple):
    """What the source, the concept, a label or the languages must be; no value counts as empty."""

    key: str
    value: str
    equal: bool
    """Whether the sample's must be this value, or any other."""

    def holds(self, index: pyarrow.Table) -> pyarrow.Array:
        """Return which rows of an index meet it."""
        from pyarrow import compute  # imports much that a search does without

        values = compute.map_lookup(index["labels"], pyarrow.scalar(self.key), "first")
        if self.key in _COLUMNS:
            values = compute.coalesce(values, index[self.key])
        compare = compute.equal if self.equal else compute.not_equal
        return compare(compute.fill_null(values, ""), self.value)


def parse_condition(text: str) -> Condition:
    """Read `KEY=VALUE` or `KEY!=VALUE`; the key is `source`, `concept`, `languages` or a label.

    The languages of a sample are sorted and joined: `languages=en+zh`.
    """
    key, sign, value = text.partition("=")
    if not (key.removesuffix("!") and sign and value):
        raise DataError(f"{text!r} is not a condition; expected KEY=VALUE or KEY!=VALUE")
    return Condition(key.removesuffix("!"), value, equal=not key.endswith("!"))


class Conditions:
    """All conditions on the samples of a source, such as `source=noto` and `group!=flags`.

    Raises:
        DataError: one is not a condition.
    """

    def __init__(self, where: Sequence[str]) -> None:
        self.where = {text: parse_condition(text) for text in where}
        self._keys = dict.fromkeys(_COLUMNS)

    def rows_of(self, index: pyarrow.Table) -> NDArray[np.int64]:
        """Return the rows of an index that meet all of them, and those that cannot be used.

        The latter are not lost in silence so: reading one says what is wrong with it.
        """
        met = np.ones(len(index), bool)
        for condition in self.where.values():
            met &= condition.holds(index).to_numpy()
        for labels in index["labels"].chunks:
            self._keys |= dict.fromkeys(labels.keys.unique().to_pylist())
        rows: NDArray[np.int64] = np.flatnonzero(met | index["error"].is_valid().to_numpy())
        return rows

    def check_keys(self, name: str) -> None:
        """Refuse, by a `DataError`, a key that no sample of the indexes read so far has."""
        for text, condition in self.where.items():
            if condition.key not in self._keys:
                raise DataError(
                    f"no sample of {name} has {condition.key!r}, which {text!r} asks for; expected "
                    f"one of {', '.join(self._keys)}"
                )
