"""Add the most used Chinese characters and words to a tokenizer, whose own ids stay as they are."""

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from vlm.cli.text_sources import ChineseListOptions, TextOptions


@dataclass(frozen=True)
class Options(ChineseListOptions, TextOptions):
    """What `vlm tokenizer extend` is given."""

    base: Path
    """Folder of the tokenizer to extend."""
    _: KW_ONLY
    vocab_size: int | None = None
    """Target vocabulary size; null adds characters only."""
    coverage: float = 0.999
    """Fraction of the Chinese characters in texts and lists that get a piece, in (0, 1]."""
    context_length: int | None = None
    """Maximum length of a text in tokens; null keeps the base's."""
    out: Path
    """Folder to write the tokenizer to."""


def run(options: Options) -> None:
    """Extend; print the folder, and on stderr what was chosen and what changed in English."""
    from vlm.text.extension import changed, extend
    from vlm.text.tokenizer import load_tokenizer
    from vlm.text.word_lists import count_words, mean_shares, shares

    base = load_tokenizer(options.base)
    sources = [shares(counts)] if (counts := count_words(options.texts("zh"))) else []
    if words := options.words("zh"):
        sources.append(words)
    extension = extend(
        base,
        mean_shares(sources),
        vocab_size=options.vocab_size,
        coverage=options.coverage,
        context_length=options.context_length,
    )
    english = list(options.texts("en"))
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
