"""Keep only the pieces of a tokenizer that texts use; of a bundle, only their rows as well."""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.bundle import is_bundle, load_bundle
from vlm.cli.text_sources import LANGUAGES, add_text_arguments, read_texts
from vlm.errors import TokenizerError
from vlm.files import write_file
from vlm.text.pruning import prune
from vlm.text.tokenizer import load_tokenizer
from vlm.vocabulary_transfer import prune_bundle

KEPT_NAME = "kept_ids.json"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm tokenizer prune`."""
    parser.add_argument("source", type=Path, help="folder of a tokenizer or of a bundle")
    add_text_arguments(parser)
    parser.add_argument(
        "--fewest_uses", type=int, default=1, help="uses in the texts from which a piece is kept"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the tokenizer or the bundle"
    )


def run(options: Any) -> None:
    """Prune; print the folder, where `kept_ids.json` has the old id of each new one."""
    if not any(getattr(options, language) for language in LANGUAGES):
        raise TokenizerError("give texts by --zh and --en: files or folders of captions")
    bundle = load_bundle(options.source) if is_bundle(options.source) else None
    tokenizer = bundle.tokenizer if bundle else load_tokenizer(options.source)
    texts = chain.from_iterable(read_texts(options, language) for language in LANGUAGES)
    smaller, kept = prune(tokenizer, texts, fewest_uses=options.fewest_uses)
    if bundle:
        prune_bundle(bundle, smaller, kept, options.out)
    else:
        smaller.save(options.out)
    write_file(options.out / KEPT_NAME, (json.dumps(kept) + "\n").encode())
    print(f"{len(kept)} of {tokenizer.vocab_size} ids are kept", file=sys.stderr)
    print(options.out)
