"""Add the most used Chinese characters and words to a tokenizer, whose own ids stay as they are."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.cli.text_sources import (
    add_text_arguments,
    add_word_list_arguments,
    read_texts,
    read_words,
)
from vlm.text.extension import changed, extend
from vlm.text.tokenizer import load_tokenizer
from vlm.text.word_lists import count_words, mean_shares, shares


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm tokenizer extend`."""
    parser.add_argument("base", type=Path, help="folder of the tokenizer to extend")
    add_text_arguments(parser)
    add_word_list_arguments(parser, ["zh"])
    parser.add_argument(
        "--vocab_size", type=int | None, default=None, help="ids wanted; none is characters only"
    )
    parser.add_argument(
        "--coverage",
        type=float,
        default=0.999,
        help="share of the Chinese characters of texts and lists that get a piece, in (0, 1]",
    )
    parser.add_argument(
        "--context_length", type=int | None, default=None, help="longest text in tokens; the base's"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")


def run(options: Any) -> None:
    """Extend; print the folder, and on stderr what was chosen and what changed in English."""
    base = load_tokenizer(options.base)
    sources = [shares(counts)] if (counts := count_words(read_texts(options, "zh"))) else []
    if words := read_words(options, "zh"):
        sources.append(words)
    extension = extend(
        base,
        mean_shares(sources),
        vocab_size=options.vocab_size,
        coverage=options.coverage,
        context_length=options.context_length,
    )
    english = list(read_texts(options, "en"))
    extension.tokenizer.save(options.out)
    print(
        f"{base.vocab_size} ids and {extension.characters} characters and {extension.words} words: "
        f"{extension.tokenizer.vocab_size}, {extension.coverage:.4%} of the Chinese characters",
        file=sys.stderr,
    )
    if english:
        different = len(changed(base, extension.tokenizer, english))
        print(f"{different} of {len(english)} English texts have other ids", file=sys.stderr)
    print(options.out)
