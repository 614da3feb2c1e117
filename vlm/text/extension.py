"""Chinese characters and words for a vocabulary that has few: chosen by use, added at its end."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vlm.errors import TokenizerError
from vlm.text.tokenizer import Tokenizer
from vlm.text.vocabulary import NewPiece
from vlm.text.words import HAN

logger = logging.getLogger(__name__)

LONGEST_WORD = 4
"""Longest word, in characters, that becomes a piece."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A tokenizer with new pieces, and what was chosen."""

    tokenizer: Tokenizer
    characters: int
    """Number of new characters."""
    words: int
    """Number of new words."""
    coverage: float
    """Share in [0, 1] of the Chinese characters of the counted text that have a piece now."""


def extend(
    base: Tokenizer,
    words: Mapping[str, float],
    *,
    vocab_size: int | None = None,
    coverage: float = 0.999,
    context_length: int | None = None,
) -> Extension:
    """Add the most used Chinese characters and words to a tokenizer; its own ids stay.

    First come characters, the most used first, until `coverage`, in (0, 1], of all is reached; what
    is then left of `vocab_size` goes to words of two to four of those characters, chosen by the
    tokens that they save: their share of the text times their length less one. Without a
    `vocab_size` there are characters only, and without a `context_length` it is the base's. Words
    have their shares of ordinary text, and characters are counted in them.

    Raises:
        TokenizerError: `vocab_size` is not above the base's, or more than the words can fill.
    """
    if vocab_size is not None and vocab_size <= base.vocab_size:
        raise TokenizerError(
            f"vocab_size is {vocab_size}; expected more than the {base.vocab_size} of the base"
        )
    if not 0 < coverage <= 1:
        raise TokenizerError(f"coverage is {coverage}; expected more than 0, at most 1")
    room = None if vocab_size is None else vocab_size - base.vocab_size
    known = set(base.vocabulary.pieces())
    character_shares: dict[str, float] = {}
    for word, share in words.items():
        for character in HAN.findall(word):
            character_shares[character] = character_shares.get(character, 0.0) + share
    if not character_shares:
        raise TokenizerError(f"there are no Chinese characters in {len(words)} words to choose")
    covered = _until_covered(character_shares, known, coverage, room)
    chosen = [(text, character_shares[text]) for text in covered if text not in known]
    characters = len(chosen)
    if room is not None:
        chosen += _most_saving(words, set(covered), known)[: room - characters]
        if len(chosen) < room:
            raise TokenizerError(
                f"vocab_size is {vocab_size}; the words have {len(chosen)} new pieces, "
                f"expected at most {base.vocab_size + len(chosen)}"
            )
    if not chosen:
        raise TokenizerError("the base has every one of these characters already")
    known_now = known.union(covered)
    lacking = sum(share for text, share in character_shares.items() if text not in known_now)
    total = sum(share for _, share in chosen)
    new = [NewPiece(text, share / total) for text, share in chosen]
    config = replace(base.config, context_length=context_length or base.context_length)
    return Extension(
        tokenizer=Tokenizer(base.vocabulary.with_pieces(new), config),
        characters=characters,
        words=len(chosen) - characters,
        coverage=1 - lacking / sum(character_shares.values()),
    )


def changed(old: Tokenizer, new: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Return the texts that two tokenizers split into other ids."""
    pairs = zip(texts, old.split(texts), new.split(texts), strict=True)
    return [text for text, before, after in pairs if before != after]


def is_extension(new: Tokenizer, old: Tokenizer) -> bool:
    """Tell whether every id of `old` is the same piece in `new`, and the same special one."""
    return (
        new.vocabulary.pieces()[: old.vocab_size] == old.vocabulary.pieces()
        and new.special_ids == old.special_ids
        and new.config.cleaning == old.config.cleaning
    )


def _until_covered(
    shares: Mapping[str, float], known: set[str], coverage: float, room: int | None
) -> list[str]:
    """Return the most used characters that together are `coverage` of all."""
    total = sum(shares.values())
    covered: list[str] = []
    reached, new = 0.0, 0
    for character in sorted(shares, key=lambda one: (-shares[one], one)):
        if reached >= coverage * total or new == room:
            break
        covered.append(character)
        reached += shares[character]
        new += character not in known
    return covered


def _most_saving(
    words: Mapping[str, float], characters: set[str], known: set[str]
) -> list[tuple[str, float]]:
    candidates = [
        (word, share)
        for word, share in words.items()
        if 2 <= len(word) <= LONGEST_WORD and word not in known and characters.issuperset(word)
    ]
    return sorted(candidates, key=lambda pair: (-pair[1] * (len(pair[0]) - 1), pair[0]))
