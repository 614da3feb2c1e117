"""Train a bilingual SentencePiece tokenizer on captions and word lists."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vlm.cli.parsing import part_of
from vlm.cli.text_sources import LANGUAGES, ChineseListOptions, TextOptions
from vlm.text.config import SentencePieceConfig


@dataclass(frozen=True, kw_only=True)
class Options(SentencePieceConfig, ChineseListOptions, TextOptions):
    """What `vlm tokenizer train` is given."""

    unique: bool = False
    """Count a text once, however often it occurs."""
    en_lists: tuple[str, ...] = ()
    """English word lists: wordfreq, or files with a word, a tab and its count a line."""
    out: Path
    """Folder to write the tokenizer to."""


def run(options: Options) -> None:
    """Train; print the folder."""
    from vlm.text.training import train_sentencepiece

    texts: dict[str, Iterable[str]] = {language: options.texts(language) for language in LANGUAGES}
    if options.unique:
        texts = {language: dict.fromkeys(captions) for language, captions in texts.items()}
    words = {language: options.words(language) for language in LANGUAGES}
    tokenizer = train_sentencepiece(
        texts,
        part_of(options, SentencePieceConfig),
        word_lists={language: counts for language, counts in words.items() if counts},
    )
    tokenizer.save(options.out)
    print(options.out)
