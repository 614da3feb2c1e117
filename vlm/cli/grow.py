"""Let a bundle's model read an extended tokenizer and longer texts."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.bundle import load_bundle
from vlm.models.config import GrowthConfig
from vlm.text.tokenizer import load_tokenizer
from vlm.vocabulary_transfer import grow_bundle


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm grow`."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle to grow")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of the extended tokenizer"
    )
    parser.add_class_arguments(GrowthConfig, skip={"vectors"})
    parser.add_argument(
        "--vectors", type=Path, nargs="+", default=[], metavar="FILE",
        help="for `similarity`: files of word vectors in one space for both languages",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for the grown bundle")


def run(options: Any) -> None:
    """Grow; print the folder."""
    settings = {name: getattr(options, name) for name in GrowthConfig.__dataclass_fields__}
    config = GrowthConfig(**settings | {"vectors": tuple(options.vectors)})
    bundle = load_bundle(options.bundle)
    grown = grow_bundle(bundle, load_tokenizer(options.tokenizer), config, options.out)
    if config.init in ("lexicon", "similarity"):
        print(
            f"{grown.known} of {len(grown.rows)} new pieces by {config.init}, "
            "the others by the mean of what they were split into",
            file=sys.stderr,
        )
    print(options.out)
