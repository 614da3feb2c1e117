"""What a source was understood to hold, for people to check."""

from collections import Counter
from collections.abc import Mapping
from functools import partial

from vlm.data.config import CACHE_GIB, SourceConfig
from vlm.data.copies import local_copy, node_cache
from vlm.data.fields import understood
from vlm.data.layout import Kind, layout_of
from vlm.data.parallel import TYPICAL_BYTES, over
from vlm.data.scanning import first_record
from vlm.data.source import Source


def kind_and_fields(config: SourceConfig) -> tuple[Kind, Mapping[str, str], Mapping[str, int]]:
    """Return the kind of a source, its fields with their languages, and what it leaves out."""
    layout = layout_of(config)
    file = layout.files[0]
    with local_copy(file, node_cache(CACHE_GIB), verify="size") as path:
        record = first_record(path, file.images, config)
    return layout.kind, understood(record, config), layout.left_out


def counts_of(source: Source) -> tuple[Counter[str], Counter[str], list[str]]:
    """Count what a source holds by the indexes of its shards; a bar is shown on a terminal.

    Returns:
        By language how many samples have a caption, by language the number of captions, and why
        each sample that cannot be used cannot.
    """
    samples, captions, errors = Counter[str](), Counter[str](), list[str]()
    for found in over(
        partial(_counts_in, source),
        range(len(source.sizes)),
        size=len(source) * TYPICAL_BYTES,
        title="counting",
    ):
        samples += found[0]
        captions += found[1]
        errors += found[2]
    return samples, captions, errors


def _counts_in(source: Source, shard: int) -> tuple[Counter[str], Counter[str], list[str]]:
    rows = source.rows(shard, ["captions", "error"])
    found = [each for row in rows if row["error"] is None for each in row["captions"]]
    captions = Counter[str]()
    for language, texts in found:
        captions[language] += len(texts)
    samples = Counter(language for language, _ in found)
    return samples, captions, [row["error"] for row in rows if row["error"] is not None]
