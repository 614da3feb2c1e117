"""Tokenizers measured on texts: number of tokens, truncation, characters without a piece."""

import json
import logging
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlm.errors import TokenizerError
from vlm.text.cleaning import CLEANING
from vlm.text.tokenizer import Tokenizer
from vlm.text.words import split_words

_BATCH = 1024  # texts that are split or encoded at a time
_LISTED = 10  # words that cost most
_SPACE_SIGNS = "▁Ġ "  # SentencePiece's, that of byte-level pieces, and a plain space


@dataclass(frozen=True, kw_only=True)
class SplitWord:
    """A word that a tokenizer splits."""

    word: str
    """As it is written in the texts."""
    pieces: int
    """Number of pieces of the word alone, signs of a space not counted."""
    occurrences: int
    """How often the texts have it."""


@dataclass(frozen=True, kw_only=True)
class TextStatistics:
    """One tokenizer measured on the texts of one language.

    Texts, characters and words are counted as they are written, so they are the same for every
    tokenizer. Fractions (`*_share`) are in [0, 1].
    """

    texts: int
    """Number of texts."""
    characters: int
    """Number of characters that are no white space."""
    words: int
    """Number of words (`vlm.text.words`)."""
    tokens_per_text: float
    """Mean length in tokens, begin and end included and nothing truncated."""
    tokens_per_character: float
    """Pieces of all texts, without begin and end, by `characters`."""
    tokens_per_word: float
    """Pieces of all texts, without begin and end, by `words`; punctuation has pieces too."""
    tokens_p50: int
    """Length in tokens, begin and end included, that half of the texts do not exceed."""
    tokens_p99: int
    """Length in tokens, begin and end included, that 99 of 100 texts do not exceed."""
    tokens_max: int
    """Length of the longest text in tokens, begin and end included."""
    truncated: int
    """Number of texts longer than the tokenizer's context, begin and end included."""
    truncated_share: float
    """Fraction of texts longer than the tokenizer's context."""
    unknown_share: float
    """Fraction of the characters of the cleaned texts that have no piece of their own.

    Such a character alone is split, mostly into bytes, becomes unknown or vanishes. One that
    the vocabulary itself writes as several characters, as NFKC does `…` as `...`, needs a piece
    for each of them. The single byte of an ASCII character is a piece of its own, the sign of a
    space is a piece of no character.
    """
    round_trip_share: float
    """Fraction of texts that come back from their ids, up to case, width (NFKC) and white space."""
    most_split_words: tuple[SplitWord, ...]
    """At most ten words that cost most: by occurrences x (pieces - 1), the highest first."""
    seconds: float
    """Time to encode all texts, in batches of 1,024, after all of them were split once."""
    texts_per_second: float
    """Texts by `seconds`."""


@dataclass(frozen=True, kw_only=True)
class TokenizerSize:
    """What is known of a tokenizer without texts."""

    vocab_size: int
    """Number of ids."""
    context_length: int
    """Longest text in tokens, begin and end included."""
    fingerprint: str
    """SHA-256 of what decides which ids a text gets."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Several tokenizers measured on the same texts."""

    tokenizers: Mapping[str, TokenizerSize]
    """By the tokenizer's name."""
    statistics: Mapping[str, Mapping[str, TextStatistics]]
    """By language, then by the tokenizer's name."""

    def as_record(self) -> dict[str, Any]:
        """Return the report in types that JSON has, with the keys of the dataclasses."""
        record = json.loads(json.dumps(asdict(self)))  # in which tuples are lists
        return {"tokenizers": record["tokenizers"], "languages": record["statistics"]}


def compare(tokenizers: Mapping[str, Tokenizer], texts: Mapping[str, Sequence[str]]) -> Report:
    """Measure every tokenizer, by the name to show, on the texts of every language.

    Raises:
        TokenizerError: there is no tokenizer or no language, a language has no texts or none
            with words, or a text is not valid Unicode.
    """
    if not tokenizers or not texts:
        raise TokenizerError("there is nothing to compare; expected tokenizers and texts")
    words = {language: _count_words(some, f" in {language!r}") for language, some in texts.items()}
    return Report(
        tokenizers={
            name: TokenizerSize(
                vocab_size=tokenizer.vocab_size,
                context_length=tokenizer.context_length,
                fingerprint=tokenizer.fingerprint,
            )
            for name, tokenizer in tokenizers.items()
        },
        statistics={
            language: {
                name: measure(tokenizer, some, words[language])
                for name, tokenizer in tokenizers.items()
            }
            for language, some in texts.items()
        },
    )


def measure(
    tokenizer: Tokenizer, texts: Sequence[str], words: Counter[str] | None = None
) -> TextStatistics:
    """Measure one tokenizer on the texts of one language; its own count of truncated texts is kept.

    `words` may hold the counts of the texts' words, if they are known already.

    Raises:
        TokenizerError: there are no texts or none with words, or a text is not valid Unicode.
    """
    words = words or _count_words(texts)
    markers = 1 if tokenizer.special_ids.begin_of_text is None else 2
    clean = CLEANING[tokenizer.config.cleaning]
    lengths: list[int] = []
    came_back = 0
    cleaned: Counter[str] = Counter()
    for batch in _batches(texts):
        for text, ids in zip(batch, tokenizer.split(batch), strict=True):
            lengths.append(len(ids) + markers)
            # Not the tokenizer's `decode`: its padding may be a piece that texts have as well.
            came_back += _comparable(text) == _comparable(tokenizer.vocabulary.decode(ids))
            # Single spaces, because some cleaning writes long ones in letters.
            cleaned.update(clean(" ".join(text.split())))
    pieces = sum(lengths) - markers * len(texts)
    characters = sum(len("".join(text.split())) for text in texts)
    truncated = sum(length > tokenizer.context_length for length in lengths)
    # The length of some text, not one between two.
    p50, p99 = np.percentile(lengths, [50, 99], method="inverted_cdf").tolist()
    seconds = _seconds_to_encode(tokenizer, texts)
    return TextStatistics(
        texts=len(texts),
        characters=characters,
        words=words.total(),
        tokens_per_text=sum(lengths) / len(texts),
        tokens_per_character=pieces / characters,
        tokens_per_word=pieces / words.total(),
        tokens_p50=p50,
        tokens_p99=p99,
        tokens_max=max(lengths),
        truncated=truncated,
        truncated_share=truncated / len(texts),
        unknown_share=_unknown_share(tokenizer, cleaned),
        round_trip_share=came_back / len(texts),
        most_split_words=_most_split(tokenizer, words),
        seconds=seconds,
        texts_per_second=len(texts) / seconds,
    )


def _count_words(texts: Iterable[str], where: str = "") -> Counter[str]:
    words: Counter[str] = Counter()
    for text in texts:
        words.update(split_words(text))
    if not words:
        raise TokenizerError(f"there are no texts with words{where}; expected captions to measure")
    return words


def _comparable(text: str) -> str:
    """Return a text without what a tokenizer may change: case, width and white space."""
    narrow = unicodedata.normalize("NFKC", text).casefold()
    # A folded character may be one that NFKC changes again.
    return "".join(unicodedata.normalize("NFKC", narrow).split())


def _unknown_share(tokenizer: Tokenizer, cleaned: Counter[str]) -> float:
    counts = {char: count for char, count in cleaned.items() if not char.isspace()}
    characters = list(counts)
    encode = tokenizer.vocabulary.encode  # they are cleaned already
    rows = [row for batch in _batches(characters) for row in encode(batch)]
    rows = _without_space_signs(tokenizer, rows)
    unknown = sum(
        counts[character]
        for character, ids in zip(characters, rows, strict=True)
        if _is_unknown(character, ids, tokenizer)
    )
    return unknown / sum(counts.values()) if counts else 0.0


def _is_unknown(character: str, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    if not ids:  # marks and control characters are often left out on purpose
        return unicodedata.category(character)[0] in "LNPS"
    if tokenizer.special_ids.unknown in ids:
        return True
    written = "".join(tokenizer.vocabulary.decode(ids).split())
    return len(ids) > max(1, len(written))


def _most_split(tokenizer: Tokenizer, words: Counter[str]) -> tuple[SplitWord, ...]:
    different = list(words)
    rows = [row for batch in _batches(different) for row in tokenizer.split(batch)]
    split = [
        SplitWord(word=word, pieces=len(ids), occurrences=words[word])
        for word, ids in zip(different, _without_space_signs(tokenizer, rows), strict=True)
        if len(ids) > 1
    ]
    split.sort(key=lambda word: (word.occurrences * (1 - word.pieces), word.word))
    return tuple(split[:_LISTED])


def _without_space_signs(tokenizer: Tokenizer, rows: Iterable[Sequence[int]]) -> list[list[int]]:
    signs = {
        token_id
        for token_id, piece in enumerate(tokenizer.vocabulary.pieces())
        if not piece.strip(_SPACE_SIGNS)
    }
    return [[token_id for token_id in row if token_id not in signs] for row in rows]


def _seconds_to_encode(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    # Another one of the same kind, so that the given one counts only what its user encodes.
    fresh = Tokenizer(tokenizer.vocabulary, tokenizer.config)
    logger = logging.getLogger("vlm.text.tokenizer")
    before, logger.disabled = logger.disabled, True  # what is truncated is in the report
    try:
        start = time.perf_counter()
        for batch in _batches(texts):
            fresh.encode(batch)
        return time.perf_counter() - start
    finally:
        logger.disabled = before


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), _BATCH):
        yield texts[start : start + _BATCH]
