"""Which samples are meant: conditions on their source, concept, labels and languages."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray

from vlm.errors import DataError


class Condition(NamedTuple):
    """What the source, the concept, a label or the languages must be; no value counts as empty."""

    key: str
    value: str
    equal: bool
    """Whether the sample's must be this value, or any other."""

    def holds(self, values: Mapping[str, str]) -> bool:
        """Say whether a sample with these values meets it."""
        return (values.get(self.key, "") == self.value) == self.equal


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
        self._keys: dict[str, None] = {}

    def rows_of(self, index: pyarrow.Table) -> NDArray[np.int64]:
        """Return the rows of an index that meet all of them, and those that cannot be used.

        The latter are no reader's loss in silence: reading one says what is wrong with it.
        """
        columns = index.select(["source", "concept", "captions", "labels", "error"]).to_pylist()
        rows = []
        for row, found in enumerate(columns):
            if found["error"] is not None:
                rows.append(row)
                continue
            values = {
                "source": found["source"],
                "concept": found["concept"],
                "languages": "+".join(sorted(language for language, _ in found["captions"])),
                **dict(found["labels"]),
            }
            self._keys |= dict.fromkeys(values)
            if all(condition.holds(values) for condition in self.where.values()):
                rows.append(row)
        return np.array(rows, np.int64)

    def check_keys(self, name: str) -> None:
        """Refuse, by a `DataError`, a key that no sample of the indexes read so far has."""
        for text, condition in self.where.items():
            if condition.key not in self._keys:
                raise DataError(
                    f"no sample of {name} has {condition.key!r}, which {text!r} asks for; expected "
                    f"one of {', '.join(self._keys)}"
                )
