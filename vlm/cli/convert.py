"""Read another project's checkpoint into a bundle, or write a bundle as one."""

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

from vlm.checkpoints.config import ConversionConfig, Extension
from vlm.cli.parsing import part_of
from vlm.errors import ConfigError
from vlm.models.config import GrowthConfig


@dataclass(frozen=True)
class Options(GrowthConfig, ConversionConfig):
    """What `vlm convert` is given."""

    source: Path
    """A bundle; a weights file of open_clip, Chinese-CLIP or M2-Encoder; or a folder of open_clip
    or of transformers' CLIPModel or ChineseCLIPModel."""
    _: KW_ONLY
    to: Path
    """Folder or file to write."""
    format: Literal["bundle", "open_clip", "chinese-clip", "hf", "m2"] = "bundle"
    """Format to write: chinese-clip and m2 are files, the others folders."""
    extend: Path | None = None
    """Folder of an extended tokenizer that the model is to read, as the options from init to seed
    say."""


def run(options: Options) -> None:
    """Convert; print what was written."""
    growth = part_of(options, GrowthConfig)
    if options.extend is None and growth != GrowthConfig():
        raise ConfigError("new rows and positions need a tokenizer; name it with --extend")
    from vlm.checkpoints.conversion import convert

    extension = Extension(tokenizer=options.extend, growth=growth) if options.extend else None
    sentences = convert(
        options.source,
        options.to,
        part_of(options, ConversionConfig),
        extension=extension,
        target=None if options.format == "bundle" else options.format,
    )
    for sentence in sentences:
        print(sentence, file=sys.stderr)
    print(options.to)
