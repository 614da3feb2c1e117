"""Train a bilingual SentencePiece tokenizer on captions and word lists."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.cli.text_sources import (
    LANGUAGES,
    add_text_arguments,
    add_word_list_arguments,
    read_texts,
    read_words,
)
from vlm.text.config import SentencePieceConfig
from vlm.text.training import train_sentencepiece


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm tokenizer train`."""
    add_text_arguments(parser)
    parser.add_argument(
        "--unique", type=bool, default=False, help="count a text once however often it comes"
    )
    add_word_list_arguments(parser, list(LANGUAGES))
    parser.add_class_arguments(SentencePieceConfig)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")


def run(options: Any) -> None:
    """Train; print the folder."""
    config = SentencePieceConfig(
        **{name: getattr(options, name) for name in SentencePieceConfig.__dataclass_fields__}
    )
    texts: dict[str, Iterable[str]] = {
        language: read_texts(options, language) for language in LANGUAGES
    }
    if options.unique:
        texts = {language: dict.fromkeys(captions) for language, captions in texts.items()}
    words = {language: read_words(options, language) for language in LANGUAGES}
    word_lists: dict[str, dict[str, float]] = {
        language: shares for language, shares in words.items() if shares
    }
    tokenizer = train_sentencepiece(texts, config, word_lists=word_lists)
    tokenizer.save(options.out)
    print(options.out)
