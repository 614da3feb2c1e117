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
_CAPTIONS = 300  # characters, as a caption may be a whole page


@dataclass(frozen=True)
class Options(SourceOptions):
    """What `vlm data show` is given."""


def run(options: Options) -> None:
    """Print the kind and the fields, counts, what cannot be used, and the first samples."""
    refuse_several_processes("data show")
    from vlm.data.sample import counted, described
    from vlm.data.source import open_source
    from vlm.data.summary import counts_of, kind_and_fields
    from vlm.images.decoding import decode_image

    config = options.source()
    kind, fields, left_out = kind_and_fields(config)
    source = open_source(config)
    samples, captions, errors = counts_of(source)
    print(f"{config.path}: {kind}, {described(source.sizes)}")
    for field, language in fields.items():
        print(f"field {field}: {language}")
    for language, number in samples.most_common():
        of_language = counted(captions[language], "caption")
        print(f"{language}: {of_language} of {counted(number, 'sample')}")
    for reason, count in left_out.items():
        print(f"left out: {count:,} {reason}")
    if errors:
        print(f"cannot be used: {counted(len(errors), 'sample')}; the first: {errors[0]}")
    for sample in islice(_usable(source), _SHOWN):
        try:
            width, height = decode_image(sample.image, name=sample.address).size
        except DataError as error:
            print(f"{sample.uid}: cannot be used: {error}")
            continue
        print(f"{sample.uid}: {width} x {height} pixels, {sample.captions!s:.{_CAPTIONS}}")


def _usable(source: "Source") -> Iterator["Sample"]:
    for index in range(len(source)):
        with suppress(DataError):  # it is counted above
            yield source[index]
