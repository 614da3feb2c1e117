"""The options by which tokenizer verbs are given texts and word lists."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.data.captions import read_captions
from vlm.text.word_lists import Language, mean_shares, read_word_list, with_traditional

LANGUAGES: Mapping[Language, str] = {"zh": "Chinese", "en": "English"}


def add_text_arguments(parser: ArgumentParser) -> None:
    """Declare where texts come from."""
    for language, name in LANGUAGES.items():
        parser.add_argument(
            f"--{language}",
            type=Path,
            nargs="+",
            default=[],
            metavar="SOURCE",
            help=f"{name} texts: .txt, .csv, .tsv, .jsonl, .parquet, .html, shards or folders",
        )
    parser.add_argument(
        "--column", type=str, default="", help="column of tables, if its name does not tell"
    )
    parser.add_argument("--split", type=str, default="train", help="split of data folders")


def read_texts(options: Any, language: str) -> Iterator[str]:
    """Give the texts of a language, none where no source was named; progress goes to stderr."""
    sources = getattr(options, language)
    if not sources:
        return iter(())
    return read_captions(
        sources,
        language,
        column=options.column,
        split=options.split,
        progress=sys.stderr.isatty(),
    )


def add_word_list_arguments(parser: ArgumentParser, languages: Sequence[Language]) -> None:
    """Declare word lists."""
    for language in languages:
        parser.add_argument(
            f"--{language}_lists",
            type=str,
            nargs="+",
            default=[],
            metavar="LIST",
            help=f"{LANGUAGES[language]} word lists: wordfreq, jieba (Chinese only), "
            "or files with a word, a tab and its count a line",
        )
    parser.add_argument(
        "--traditional",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="part of the Chinese lists to spell in traditional characters, in [0, 1)",
    )


def read_words(options: Any, language: Language) -> dict[str, float]:
    """Return the mean shares of words over the lists of a language; empty where there is none."""
    lists = [read_word_list(name, language) for name in getattr(options, f"{language}_lists")]
    words = mean_shares(lists) if lists else {}
    if words and language == "zh" and options.traditional:
        return with_traditional(words, options.traditional)
    return words
