"""A smaller vocabulary for the texts at hand: the pieces they use, and no others."""

from collections import Counter
from collections.abc import Iterable
from itertools import islice

from vlm.errors import TokenizerError
from vlm.text.tokenizer import Tokenizer

_BATCH = 8192


def count_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """Count how often texts use each id; texts are read a batch at a time."""
    counts: Counter[int] = Counter()
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH)):
        for row in tokenizer.split(batch):
            counts.update(row)
    return counts


def prune(
    tokenizer: Tokenizer, texts: Iterable[str], *, fewest_uses: int = 1
) -> tuple[Tokenizer, list[int]]:
    """Keep the pieces that texts use, so that these texts are split as before.

    Special pieces, single bytes and what byte-pair merges need on their way are kept as well. A
    piece is kept from `fewest_uses` on; more than 1 may split some texts otherwise than before.

    Returns:
        The smaller tokenizer, and the old id of each of its ids, ascending: the rows that a
        model's embedding keeps.

    Raises:
        TokenizerError: there are no texts, or the vocabulary is of a kind that cannot be reduced.
    """
    if fewest_uses < 1:
        raise TokenizerError(f"fewest_uses is {fewest_uses}; expected at least 1")
    used = [token for token, n in count_ids(tokenizer, texts).items() if n >= fewest_uses]
    if not used:
        raise TokenizerError("the texts use no piece; expected captions to keep the pieces of")
    special = tokenizer.special_ids
    marks = (special.begin_of_text, special.end_of_text, special.padding, special.unknown)
    keep = {*used, *(token for token in marks if token is not None)}
    vocabulary, kept = tokenizer.vocabulary.reduced_to(sorted(keep))
    return Tokenizer(vocabulary, tokenizer.config), kept
