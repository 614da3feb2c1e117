"""`Sample`, the record that crosses the data room's walls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with its captions, as stored in a shard."""

    uid: str
    """Unique name of the sample; also its key in the shard."""
    image: bytes
    """The encoded image (WebP, PNG or JPEG)."""
    captions: Mapping[str, Sequence[str]]
    """Captions by language code (`zh`, `en`, ...); the first of a language is its main caption."""
    concept: str
    """What the image shows: samples of one concept are never negatives of each other."""
    source: str = ""
    """Where the image comes from, for example the drawing style."""
    licence: str = ""
    """SPDX identifier of the image's licence."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Further labels, for example the class used in zero-shot classification."""
    address: str = field(default="", compare=False)
    """Where it was read from, `FOLDER/SHARD#ROW`; empty for a sample that is in no shard yet."""


def counted(number: int, noun: str) -> str:
    """Return a number of things, as in `1 sample` and `2,000 samples`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def described(sizes: Sequence[int]) -> str:
    """Return how many samples there are in shards of some sizes: `2,000 samples in 3 shards`."""
    return f"{counted(sum(sizes), 'sample')} in {counted(len(sizes), 'shard')}"
