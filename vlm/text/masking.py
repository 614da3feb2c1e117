"""Whole-word masks: which tokens of a text are hidden, so that the others and an image say them.

A word is masked as a whole or not at all, in Chinese as in English (Cui et al. 2021, "Pre-training
with whole word masking for Chinese BERT"): what is left of a word would give the rest away.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm.errors import ConfigError, TokenizerError
from vlm.text.cleaning import CLEANING
from vlm.text.tokenizer import TokenBatch, Tokenizer
from vlm.text.words import split_words


def word_mask(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    tokens: TokenBatch,
    ratio: float,
    rngs: Sequence[random.Random],
) -> Bool[Tensor, "batch length"]:
    """Draw words of each text and say which tokens are theirs; begin, end and padding never are.

    As many words are drawn as reach the ratio, in (0, 1], of a text's tokens on average: the one
    that would exceed it is taken with the probability that makes it so. A text of any token loses
    at least one word; one that was truncated has words only where its tokens are left. Texts are
    not cleaned yet; each has its own source of chance, and the same states give the same masks.

    Raises:
        ConfigError: `ratio` is out of its range.
        TokenizerError: the tokens are not those of the texts.
    """
    if not 0 < ratio <= 1:
        raise ConfigError(f"the ratio of masked tokens is {ratio}; expected more than 0, at most 1")
    clean = CLEANING[tokenizer.config.cleaning]
    cleaned = [clean(text) for text in texts]
    before = 0 if tokenizer.special_ids.begin_of_text is None else 1
    counts = [length - before - 1 for length in tokens.mask.sum(dim=1).tolist()]
    all_spans = tokenizer.vocabulary.spans(cleaned)
    room = tokenizer.context_length - before - 1
    if counts != [min(len(spans), room) for spans in all_spans]:
        raise TokenizerError("the tokens to mask are not those of the texts")
    masked_rows: list[int] = []
    masked_columns: list[int] = []
    rows = zip(cleaned, all_spans, counts, rngs, strict=True)
    for row, (text, spans, count, rng) in enumerate(rows):
        cut = len(spans) - count if tokenizer.config.truncation == "left" else 0
        drawn = _draw(pieces_by_word(text, spans[cut : cut + count]), ratio * count, rng)
        masked_rows += [row] * len(drawn)
        masked_columns += [before + piece for piece in drawn]
    mask = torch.zeros_like(tokens.mask)
    mask[masked_rows, masked_columns] = True
    return mask


def pieces_by_word(text: str, spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the numbers of a cleaned text's pieces, word by word, from where its pieces stand.

    Pieces are of one word if a word of `vlm.text.words` reaches from one into the next, so two
    words that share a piece are one. A character of no word, such as a comma, is a word by
    itself, and a space is a part of what comes after it.
    """
    word_at = _word_of_each_character(text)
    words: list[list[int]] = []
    last_word = None
    for piece, (start, end) in enumerate(spans):
        if word_at[start] == last_word:
            words[-1].append(piece)
        else:
            words.append([piece])
        last_word = word_at[max(start, end - 1)]
    return words


def _word_of_each_character(text: str) -> list[int]:
    """Return a number for each character, and one for the end, alike within a word."""
    numbers = [*range(len(text) + 1)]
    end = 0
    for word in split_words(text):
        start = text.index(word, end)
        end = start + len(word)
        numbers[start:end] = [start] * len(word)
    for place in reversed(range(len(text) - 1)):
        if text[place].isspace():
            numbers[place] = numbers[place + 1]
    return numbers


def _draw(words: list[list[int]], wanted: float, rng: random.Random) -> list[int]:
    """Return the pieces of words drawn until `wanted` pieces are reached, on average exactly."""
    rng.shuffle(words)
    drawn: list[int] = []
    for word in words:
        lacking = wanted - len(drawn)
        if lacking < len(word):
            if not drawn or rng.random() * len(word) < lacking:
                drawn += word
            break
        drawn += word
    return drawn
