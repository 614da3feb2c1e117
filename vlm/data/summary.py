"""What a source was understood to hold, for people to check."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vlm.data.config import CACHE_GIB, SourceConfig
from vlm.data.copies import local_copy, node_cache
from vlm.data.fields import understood
from vlm.data.layout import Kind, layout_of
from vlm.data.parallel import TYPICAL_BYTES, over
from vlm.data.scanning import first_record
from vlm.data.source import Source


@dataclass(slots=True)
class Summary:
    """The samples of a source by what they have."""

    samples: Counter[str] = field(default_factory=Counter)
    """By language, how many have a caption."""
    captions: Counter[str] = field(default_factory=Counter)
    """By language, the number of captions."""
    unusable: int = 0
    """How many cannot be used."""
    reason: str = ""
    """Why the first of these cannot."""


def kind_and_fields(config: SourceConfig) -> tuple[Kind, Mapping[str, str], Mapping[str, int]]:
    """Return the kind of a source, its fields with their languages, and what it leaves out."""
    layout = layout_of(config)
    file = layout.files[0]
    if file.images:
        record = first_record(Path(file.path), file.images, config)
    else:
        with local_copy(file, node_cache(CACHE_GIB)) as path:
            record = first_record(path, (), config)
    return layout.kind, understood(record, config), layout.left_out


def summary_of(source: Source) -> Summary:
    """Count what a source holds by the indexes of its shards; a bar is shown on stderr."""
    total, shards = Summary(), range(len(source.sizes))
    size = len(source) * TYPICAL_BYTES
    for found in over(partial(_summary_in, source), shards, size=size, title="counting"):
        total.samples += found.samples
        total.captions += found.captions
        total.unusable += found.unusable
        total.reason = total.reason or found.reason
    return total


def _summary_in(source: Source, shard: int) -> Summary:
    found = Summary()
    for row in source.rows(shard, ["captions", "error"]):
        if row["error"] is not None:
            found.unusable += 1
            found.reason = found.reason or row["error"]
            continue
        for language, texts in row["captions"]:
            found.samples[language] += 1
            found.captions[language] += len(texts)
    return found
