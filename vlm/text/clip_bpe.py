"""CLIP's byte-pair vocabulary, split in Rust into the very ids of open_clip's `SimpleTokenizer`."""

import gzip
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain, groupby
from pathlib import Path

import regex
from open_clip.tokenizer import default_bpe
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as RustTokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
)
from tokenizers.models import BPE

from vlm.errors import TokenizerError
from vlm.text.config import TokenizerConfig
from vlm.text.fast_vocabulary import FastVocabulary
from vlm.text.tokenizer import Tokenizer

BEGIN, END = "<start_of_text>", "<end_of_text>"
CONTEXT_LENGTH = 77
CLIP_VOCAB_SIZE = 49_408

_MERGES = 49_152 - 256 - 2  # as many of the file's lines as CLIP was trained with
_END_OF_WORD = "</w>"


def clip_tokenizer(merges: Path | None = None) -> Tokenizer:
    """Return CLIP's tokenizer: 49,408 ids, English text, 77 tokens (Radford et al. 2021, 2.4).

    `merges` is CLIP's list of merges, gzipped; None for the one that open_clip ships.
    """
    path = merges or Path(default_bpe())
    try:
        vocabulary = _vocabulary(path.read_bytes())
    except Exception as error:  # the library raises nothing more definite
        raise TokenizerError(f"{path} is not a gzipped list of CLIP's merges: {error}") from error
    config = TokenizerConfig(
        context_length=CONTEXT_LENGTH,
        begin_of_text=BEGIN,
        end_of_text=END,
        padding="!",  # id 0, which CLIP's batches are filled with
        cleaning="clip",
    )
    return Tokenizer(vocabulary, config)


@cache
def _vocabulary(merges: bytes) -> FastVocabulary:
    # Characters stand for bytes, in the order of CLIP's ids: those that Latin-1 prints for
    # themselves, then those from U+0100 on for the others.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = list(map(chr, [*printed, *range(0x100, 0x200 - len(printed))]))
    lines = gzip.decompress(merges).decode().split("\n")[1 : _MERGES + 1]
    pairs = [(left, right) for left, right in map(str.split, lines)]
    if len(pairs) != _MERGES:
        raise ValueError(f"it has {len(pairs)} merges, expected {_MERGES}")
    pieces = [*symbols, *(symbol + _END_OF_WORD for symbol in symbols), *map("".join, pairs)]
    ids = {piece: index for index, piece in enumerate(pieces)}
    rust = _byte_pairs(ids, pairs, (BEGIN, END), _word_pattern())
    return FastVocabulary(rust.to_str().encode())


def published_clip_vocabulary(
    ids: Mapping[str, int], merges: str, added: Mapping[str, int], *, begin: str, end: str
) -> FastVocabulary:
    """Return CLIP's vocabulary from `vocab.json`, `merges.txt` and `added_tokens.json`.

    Hugging Face's older tokenizers have these files. Texts are lower-cased and composed, as
    transformers 5 does it with such files; encodings are not mended, as OpenAI's program and
    transformers' slow tokenizers did. Added pieces are found before any word is split; `begin` and
    `end` are the pieces around every text.
    """
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    try:
        new = sorted((i, piece) for piece, i in added.items() if ids.get(piece) != i)
        pairs = [(left, right) for left, right in map(str.split, lines)]
        whole = "|".join(map(re.escape, (begin, end)))
        words = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
        rust = _byte_pairs(ids, pairs, (begin, end), f"{whole}|{words}")
    except Exception as error:  # the library raises nothing more definite
        raise TokenizerError(f"the merges do not fit the vocabulary: {error}") from error
    rust.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    rust.add_tokens([AddedToken(piece, normalized=True) for _, piece in new])
    misplaced = [piece for i, piece in [*new, (ids.get(end), end)] if rust.token_to_id(piece) != i]
    if misplaced:
        raise TokenizerError(
            f"{len(misplaced)} pieces do not have the ids that they are given ({misplaced[0]!r})"
        )
    return FastVocabulary(rust.to_str().encode())


def _byte_pairs(
    ids: Mapping[str, int],
    pairs: Sequence[tuple[str, str]],
    specials: tuple[str, str],
    words: str,
) -> RustTokenizer:
    rust = RustTokenizer(BPE(dict(ids), list(pairs), end_of_word_suffix=_END_OF_WORD))
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(_END_OF_WORD, " "), decoders.Strip(" ", 0, 1)]
    )
    rust.add_special_tokens([AddedToken(piece, normalized=False) for piece in specials])
    return rust


def _word_pattern() -> str:
    """Return the pattern of CLIP's words for the Rust library's regular expressions.

    CLIP's own pattern is read by the package `regex`, which ignores case and knows a newer
    Unicode. Where it takes a character for something else than the Rust library does, that is
    written out.
    """
    # Every code point that can be a letter or a digit: planes 4 to 13 are empty, the last private.
    characters = "".join(
        map(chr, chain(range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xF0000)))
    )
    letters, digits = _class(r"\p{L}", characters), _class(r"\p{N}", characters)
    # One combining letter, U+0345, is neither in a class nor outside of it when case is ignored.
    neither = set(characters)
    for one in (r"\s", r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]"):
        neither -= set(regex.findall(one, characters, regex.IGNORECASE))
    return (
        "<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d"
        rf"|[{letters}]+|[{digits}]|[^\s{letters}{digits}{_ranges(neither)}]+"
    )


def _class(category: str, characters: str) -> str:
    theirs = set(regex.findall(category, characters, regex.IGNORECASE))
    rust = pre_tokenizers.Split(Regex(f"{category}+"), behavior="removed", invert=True)
    ours = set("".join(run for run, _ in rust.pre_tokenize_str(characters)))
    assert ours <= theirs, "the Rust library knows a newer Unicode than the package regex"
    return category + _ranges(theirs - ours)


def _ranges(characters: Iterable[str]) -> str:
    points = sorted(map(ord, characters))
    # Numbers in a row have the same distance to their place.
    runs = [list(run) for _, run in groupby(enumerate(points), lambda pair: pair[1] - pair[0])]
    return "".join(rf"\x{{{run[0][1]:x}}}-\x{{{run[-1][1]:x}}}" for run in runs)
