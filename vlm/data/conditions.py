"""Which samples are meant: conditions on their source, concept, labels and languages."""

from collections.abc import Sequence

import numpy as np
import pyarrow
from numpy.typing import NDArray

from vlm.errors import DataError

_COLUMNS = ("source", "concept", "languages")


class Conditions:
    """What samples must meet: `KEY=VALUE` or `KEY!=VALUE`, where no value counts as empty.

    A key is `source`, `concept`, `languages` or a label. The languages of a sample are sorted and
    joined: `languages=en+zh`.

    Raises:
        DataError: one is not a condition.
    """

    def __init__(self, where: Sequence[str]) -> None:
        self.where = {text: text.partition("=") for text in where}
        self._keys = dict.fromkeys(_COLUMNS)
        for text, (key, sign, value) in self.where.items():
            if not (key.removesuffix("!") and sign and value):
                raise DataError(f"{text!r} is not a condition; expected KEY=VALUE or KEY!=VALUE")

    def rows_of(self, index: pyarrow.Table) -> NDArray[np.int64]:
        """Return the rows of an index that meet all of them, and those that cannot be used.

        The latter are not lost in silence so: reading one says what is wrong with it.
        """
        from pyarrow import compute  # imports much that a search does without

        met = np.ones(len(index), bool)
        for key, _, value in self.where.values():
            name = key.removesuffix("!")
            values = compute.map_lookup(index["labels"], pyarrow.scalar(name), "first")
            if name in _COLUMNS:
                values = compute.coalesce(values, index[name])
            compare = compute.equal if name == key else compute.not_equal
            met &= compare(compute.fill_null(values, ""), value).to_numpy()
        for labels in index["labels"].chunks:
            self._keys |= dict.fromkeys(labels.keys.unique().to_pylist())
        rows: NDArray[np.int64] = np.flatnonzero(met | index["error"].is_valid().to_numpy())
        return rows

    def check_keys(self, name: str) -> None:
        """Refuse, by a `DataError`, a key that no sample of the indexes read so far has."""
        for text, (key, _, _) in self.where.items():
            if key.removesuffix("!") not in self._keys:
                raise DataError(
                    f"no sample of {name} has {key.removesuffix('!')!r}, which {text!r} asks for; "
                    f"expected one of {', '.join(self._keys)}"
                )
