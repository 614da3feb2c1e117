"""Which samples are meant: conditions on their source, their concept and their labels."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vlm.data.sample import Sample
from vlm.errors import DataError


class Condition(NamedTuple):
    """What the source, the concept or a label must be; a sample without it counts as empty."""

    key: str
    value: str
    equal: bool
    """Whether the sample's must be this value, or any other."""

    def __call__(self, sample: Sample) -> bool:
        """Say whether a sample meets it."""
        return (_values_of(sample).get(self.key, "") == self.value) == self.equal


def parse_condition(text: str) -> Condition:
    """Read `KEY=VALUE` or `KEY!=VALUE`; the key is `source`, `concept` or one of the labels."""
    key, sign, value = text.partition("=")
    if not (key.removesuffix("!") and sign and value):
        raise DataError(f"{text!r} is not a condition; expected KEY=VALUE or KEY!=VALUE")
    return Condition(key.removesuffix("!"), value, equal=not key.endswith("!"))


def samples_where(
    samples: Iterable[Sample], where: Sequence[str], *, name: str
) -> Iterator[Sample]:
    """Give the samples that meet all conditions, such as `source=noto` or `group!=flags`.

    Raises:
        DataError: a condition is not one; or, after the last sample, one asks for a key that no
            sample has.
    """
    conditions = [parse_condition(text) for text in where]
    keys: dict[str, None] = {}
    for sample in samples:
        keys |= dict.fromkeys(_values_of(sample))
        if all(holds(sample) for holds in conditions):
            yield sample
    for condition, text in zip(conditions, where, strict=True):
        if condition.key not in keys:
            raise DataError(
                f"no sample of {name} has {condition.key!r}, which {text!r} asks for; expected one "
                f"of {', '.join(keys)}"
            )


def _values_of(sample: Sample) -> dict[str, str]:
    return {"source": sample.source, "concept": sample.concept, **sample.labels}
