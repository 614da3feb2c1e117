"""Let a bundle's model read an extended tokenizer and longer texts."""

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from vlm.cli.parsing import part_of
from vlm.models.config import GrowthConfig


@dataclass(frozen=True)
class Options(GrowthConfig):
    """What `vlm grow` is given."""

    bundle: Path
    """Folder of the bundle to grow."""
    _: KW_ONLY
    tokenizer: Path
    """Folder of the extended tokenizer."""
    out: Path
    """Folder to write the grown bundle to."""


def run(options: Options) -> None:
    """Grow; print the folder."""
    from vlm.bundle import load_bundle
    from vlm.text.tokenizer import load_tokenizer
    from vlm.vocabulary_transfer import grow_bundle

    bundle = load_bundle(options.bundle)
    config = part_of(options, GrowthConfig)
    grown = grow_bundle(bundle, load_tokenizer(options.tokenizer), config, options.out)
    if config.init in ("lexicon", "similarity"):
        print(
            f"{grown.known} of {len(grown.rows)} new pieces by {config.init}, "
            "the others by the mean of the pieces that they were split into",
            file=sys.stderr,
        )
    print(options.out)
