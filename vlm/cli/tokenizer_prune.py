"""Keep only the pieces of a tokenizer that texts use; of a bundle, only their rows as well."""

import json
import sys
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from pathlib import Path

from vlm.cli.text_sources import TextOptions

KEPT_NAME = "kept_ids.json"


@dataclass(frozen=True)
class Options(TextOptions):
    """What `vlm tokenizer prune` is given."""

    source: Path
    """Folder of a tokenizer or of a bundle."""
    _: KW_ONLY
    fewest_uses: int = 1
    """Minimum count of a piece in the texts."""
    out: Path
    """Folder to write the tokenizer or the bundle to."""


def run(options: Options) -> None:
    """Prune; print the folder, where `kept_ids.json` has the old id of each new one."""
    languages = options.given()
    from vlm.bundle import is_bundle, load_bundle
    from vlm.files import write_file
    from vlm.text.pruning import prune
    from vlm.text.tokenizer import load_tokenizer
    from vlm.vocabulary_transfer import prune_bundle

    bundle = load_bundle(options.source) if is_bundle(options.source) else None
    tokenizer = bundle.tokenizer if bundle else load_tokenizer(options.source)
    texts = chain.from_iterable(map(options.texts, languages))
    smaller, kept = prune(tokenizer, texts, fewest_uses=options.fewest_uses)
    if bundle:
        prune_bundle(bundle, smaller, kept, options.out)
    else:
        smaller.save(options.out)
    write_file(options.out / KEPT_NAME, (json.dumps(kept) + "\n").encode())
    print(f"{len(kept)} of {tokenizer.vocab_size} ids are kept", file=sys.stderr)
    print(options.out)
