"""Normalisers of a `tokenizer.json` that do what SentencePiece's own normaliser does."""

import base64
import unicodedata
from collections import defaultdict
from itertools import pairwise
from typing import Any

from sentencepiece import SentencePieceNormalizer
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
    ModelProto,
    NormalizerSpec,
)

from vlm.text.cleaning import mark_spaces
from vlm.text.sentencepiece_vocabulary import SPACE
from vlm.text.words import HAN

Part = dict[str, Any]
"""A part of a `tokenizer.json`."""

MOST_PLACEHOLDERS = 256
"""User-defined pieces that may need one; each is searched for twice in every text."""

_Piece = ModelProto.SentencePiece

# Put into a text on its way and taken out again. Unicode keeps them for that: no text has them.
_APART, _UNMIXED, _FIRST = "\ufdd0", "\ufdd1", "\ufdd2"
_PLACEHOLDER = 0x10F000  # the first of as many private characters as pieces need one

_START, _END = r"(?<![\s\S])", r"(?![\s\S])"  # of a text, in every dialect

_ATTACHED = "[\\p{M}\u200c\u200d\uff9e\uff9f\u0e33\u0eb3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"
"""Characters that readers take for a part of the one before."""

_FINAL_SIGMA = r"(?<=\p{Cased}|\p{Cased}\p{Case_Ignorable})Σ(?!\p{Case_Ignorable}*\p{Cased})"

_COMPOSED = [*range(0xC0, 0x3400), *range(0xFB00, 0xFB50), *range(0x11000, 0x12000)]
"""Where Unicode has characters that are composed of others, but for Korean syllables."""

_LONGEST_BLANK = 10  # spaces that `mark_spaces` gives one piece
_WHITE = "".join(character for character in map(chr, range(0x3001)) if character.isspace())


def normalisers(cleaning: str, proto: ModelProto) -> list[Part]:
    """Return what cleans a text as `vlm.text.cleaning` does and normalises it as a model does."""
    return [*_cleaning(cleaning), *_normaliser(proto, spaced=cleaning == "words")]


def of_type(proto: ModelProto, *types: int) -> list[str]:
    """Return the pieces of some types in the order of their ids."""
    return [piece.piece for piece in proto.pieces if piece.type in types]


def _replaced(pattern: str, content: str) -> Part:
    """Return the normaliser that puts `content` in the place of a regular expression."""
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _replaced_string(string: str, content: str) -> Part:
    return {"type": "Replace", "pattern": {"String": string}, "content": content}


def _cleaning(name: str) -> list[Part]:
    """Return the normalisers that clean as `vlm.text.cleaning` does."""
    if name == "lower":
        # Python knows the sigma that ends a word, Rust's lower case by character does not.
        return [_replaced(_FINAL_SIGMA, "ς"), {"type": "Lowercase"}]
    if name == "glm":
        runs = [" " * length for length in range(_LONGEST_BLANK, 1, -1)]
        return [_replaced_string(run, mark_spaces(run)) for run in runs]
    if name == "words":
        ends = f"{_START}[{_WHITE}]+|[{_WHITE}]+{_END}"
        return [_replaced(ends, ""), _replaced(f"[{_WHITE}]+", " ")]
    return []


def _normaliser(proto: ModelProto, *, spaced: bool) -> list[Part]:
    """Return the normalisers that do what sentencepiece's own does."""
    spec = proto.normalizer_spec
    space = SPACE if spec.escape_whitespaces else " "
    # What is put before a text is put there first: the library's normalisers lose count where
    # something was inserted, or multiplied, at the very beginning.
    first = space if spec.add_dummy_prefix else _FIRST
    whole = sorted(not_normal(proto), key=len, reverse=True)
    placeholders = {piece: chr(_PLACEHOLDER + index) for index, piece in enumerate(whole)}
    parts = [_replaced_string(piece, held) for piece, held in placeholders.items()]
    parts.append({"type": "Prepend", "prepend": first})
    if spaced:
        word = f"{_START}{first}(?=[^{HAN.pattern[1:-1]}])"
        parts.append(_replaced(word, f"{first} "))
    parts += _characters(spec)
    if spec.remove_extra_whitespaces:
        parts += [_replaced(f"{_START}{first} +", first), _replaced(" {2,}", " ")]
    parts += [_replaced_string(held, piece) for piece, held in placeholders.items()]
    if spec.escape_whitespaces:
        parts.append(_replaced_string(" ", SPACE))
    if not spec.add_dummy_prefix:
        parts.append(_replaced_string(_FIRST, ""))
    if spec.remove_extra_whitespaces:
        parts.append(_replaced(f"(?:{space})+{_END}", ""))
    return parts


def _characters(spec: NormalizerSpec) -> list[Part]:
    """Return the normalisers that replace characters as the charsmap of a model does.

    The library's normaliser for charsmaps takes what readers see as one character for one: it
    drops the accent from a capital letter when it finds a rule for the letter. So they are
    taken apart for it, and what the charsmap would have composed is composed by NFC, which is
    kept from composing, and from sorting, anything else.

    That is no more than nearly right for marks on what is no letter of its own, such as a dot
    below full-width letters or the sign for centimetres, and for scripts that are newer in one
    library's Unicode than in the other's.
    """
    if not spec.precompiled_charsmap:
        return []
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    parts = [
        _replaced(f"(?<=\r)(?=\n)|(?={_ATTACHED})", _APART),
        {"type": "Precompiled", "precompiled_charsmap": charsmap},
        _replaced_string(_APART, ""),
    ]
    if character_normaliser(spec).normalize("e\u0301") != "é":
        return parts
    unmixed = _unmixed()
    return [
        *[_replaced(unmixed, _APART), {"type": "NFC"}],
        *parts,
        *[_replaced(unmixed, _UNMIXED), {"type": "NFC"}, _replaced_string(_UNMIXED, "")],
    ]


def character_normaliser(spec: NormalizerSpec) -> SentencePieceNormalizer:
    """Return what replaces characters, and leaves spaces alone."""
    characters = NormalizerSpec(
        precompiled_charsmap=spec.precompiled_charsmap,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        escape_whitespaces=False,
    )
    return SentencePieceNormalizer(normalizer_spec=characters)


def not_normal(proto: ModelProto) -> list[str]:
    """Return the user-defined pieces that would be changed if they were not user-defined."""
    pieces = of_type(proto, _Piece.USER_DEFINED)
    if not pieces or not proto.normalizer_spec.precompiled_charsmap:
        return []
    normal = character_normaliser(proto.normalizer_spec).normalize(pieces)
    return [piece for piece, other in zip(pieces, normal, strict=True) if piece != other]


def _unmixed() -> str:
    """Return a pattern of the places before a mark that composes with nothing before it."""
    before: dict[str, set[str]] = defaultdict(set)
    for character in map(chr, _COMPOSED):
        apart = unicodedata.normalize("NFD", character)
        if len(apart) == 1 or unicodedata.normalize("NFC", apart) != character:
            continue
        before[apart[-1]].add(unicodedata.normalize("NFC", apart[:-1]))
        for mark, after in pairwise(apart[1:]):
            before[after].add(mark)
    marks: dict[str, list[str]] = defaultdict(list)
    for mark, characters in sorted(before.items()):
        marks["".join(sorted(characters))].append(mark)
    composing = "|".join(f"(?<=[{bases}])[{''.join(after)}]" for bases, after in marks.items())
    return rf"(?=\p{{M}})(?!{composing})"
