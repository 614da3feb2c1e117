"""What a source was understood to hold, for people to check."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from vlm.data.config import CACHE_GIB, SourceConfig
from vlm.data.copies import local_copy, node_cache
from vlm.data.fields import understood
from vlm.data.layout import Kind, layout_of
from vlm.data.parallel import TYPICAL_BYTES, over
from vlm.data.scanning import first_record
from vlm.data.source import Source


class Summary(NamedTuple):
    """The samples of a source by what they have."""

    samples: Counter[str]
    """By language, how many have a caption."""
    captions: Counter[str]
    """By language, the number of captions."""
    unusable: int
    """How many cannot be used."""
    reason: str
    """Why the first of these cannot."""


def kind_and_fields(config: SourceConfig) -> tuple[Kind, Mapping[str, str], Mapping[str, int]]:
    """Return the kind of a source, its fields with their languages, and what it leaves out."""
    layout = layout_of(config)
    file = layout.files[0]
    with local_copy(file, node_cache(CACHE_GIB), verify="size") as path:
        record = first_record(path, file.images, config)
    return layout.kind, understood(record, config), layout.left_out


def summary_of(source: Source) -> Summary:
    """Count what a source holds by the indexes of its shards; a bar is shown on a terminal."""
    found = over(
        partial(_summary_in, source),
        range(len(source.sizes)),
        size=len(source) * TYPICAL_BYTES,
        title="counting",
    )
    samples, captions, unusable, reasons = zip(*found, strict=True)
    return Summary(
        sum(samples, Counter()),
        sum(captions, Counter()),
        sum(unusable),
        next(filter(None, reasons), ""),
    )


def _summary_in(source: Source, shard: int) -> Summary:
    samples, captions, errors = Counter[str](), Counter[str](), []
    for row in source.rows(shard, ["captions", "error"]):
        if row["error"] is not None:
            errors.append(row["error"])
            continue
        for language, texts in row["captions"]:
            samples[language] += 1
            captions[language] += len(texts)
    return Summary(samples, captions, len(errors), (*errors, "")[0])
