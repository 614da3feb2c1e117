"""Read another project's checkpoint into a bundle, or write a bundle as one."""

import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from vlm.checkpoints.config import ConversionConfig, Extension
from vlm.checkpoints.conversion import convert
from vlm.errors import ConfigError
from vlm.models.config import GrowthConfig


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm convert`."""
    parser.add_argument(
        "source",
        type=Path,
        help="a bundle, a weights file of open_clip, Chinese-CLIP or M2-Encoder, or a folder of "
        "open_clip or of transformers' CLIPModel or ChineseCLIPModel",
    )
    parser.add_argument("--to", type=Path, required=True, help="folder or file to write")
    parser.add_argument(
        "--format",
        type=Literal["bundle", "open_clip", "chinese-clip", "hf", "m2"],
        default="bundle",
        help="whose format to write: a folder, or a file for chinese-clip and m2",
    )
    parser.add_class_arguments(ConversionConfig, skip={"languages"})
    parser.add_argument(
        "--languages", type=str, nargs="+", default=[], metavar="LANGUAGE",
        help="languages of the training captions, such as zh en, where the source's kind "
        "does not tell",
    )  # fmt: skip
    parser.add_argument(
        "--extend", type=Path | None, default=None, metavar="TOKENIZER",
        help="folder of an extended tokenizer for the model to read; the options below say how",
    )  # fmt: skip
    parser.add_class_arguments(GrowthConfig, skip={"vectors"})
    parser.add_argument(
        "--vectors", type=Path, nargs="+", default=[], metavar="FILE",
        help="for `similarity`: files of word vectors in one space for both languages",
    )  # fmt: skip


def run(options: Any) -> None:
    """Convert; print what was written."""
    config = _chosen(ConversionConfig, options, languages=tuple(options.languages) or None)
    growth = _chosen(GrowthConfig, options, vectors=tuple(options.vectors))
    if options.extend is None and growth != GrowthConfig():
        raise ConfigError("new rows and positions need a tokenizer; name it with --extend")
    extension = options.extend and Extension(tokenizer=options.extend, growth=growth)
    target = None if options.format == "bundle" else options.format
    for sentence in convert(options.source, options.to, config, extension=extension, target=target):
        print(sentence, file=sys.stderr)
    print(options.to)


def _chosen(kind: Any, options: Any, **changes: Any) -> Any:
    """Return a configuration with the options that have its fields' names."""
    return kind(**{name: getattr(options, name) for name in kind.__dataclass_fields__} | changes)
