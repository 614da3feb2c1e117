"""Show what a source was understood to hold: its fields, its captions, and three samples."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from vlm.cli.options import SourceOptions, refuse_several_processes
from vlm.errors import DataError

if TYPE_CHECKING:
    from vlm.data.sample import Sample
    from vlm.data.source import Source

_SHOWN = 3


@dataclass(frozen=True)
class Options(SourceOptions):
    """What `vlm data show` is given."""


def run(options: Options) -> None:
    """Print the kind and the fields, counts, what cannot be used, and the first samples."""
    refuse_several_processes("data show")
    from vlm.data.sample import counted, described
    from vlm.data.source import open_source
    from vlm.data.summary import kind_and_fields, summary_of
    from vlm.images.decoding import decode_image

    config = options.source()
    kind, fields, left_out = kind_and_fields(config)
    source = open_source(config)
    found = summary_of(source)
    print(f"{config.path}: {kind}, {described(source.sizes)}")
    for field, language in fields.items():
        print(f"field {field}: {language}")
    for language, samples in found.samples.most_common():
        captions = counted(found.captions[language], "caption")
        print(f"{language}: {captions} of {counted(samples, 'sample')}")
    for reason, count in left_out.items():
        print(f"left out: {count:,} {reason}")
    if found.unusable:
        print(f"cannot be used: {counted(found.unusable, 'sample')}; the first: {found.reason}")
    for sample in islice(_usable(source), _SHOWN):
        width, height = decode_image(sample.image, name=sample.address).size
        print(f"{sample.uid}: {width} x {height} pixels, {sample.captions}")


def _usable(source: "Source") -> Iterator["Sample"]:
    for index in range(len(source)):
        with suppress(DataError):  # it is counted above
            yield source[index]
