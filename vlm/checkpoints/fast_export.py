"""A SentencePiece tokenizer as a fast tokenizer of Hugging Face with the same ids."""

import math
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, groupby, pairwise, takewhile
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
    ModelProto,
    TrainerSpec,
)
from tokenizers import Tokenizer as RustTokenizer

from vlm.checkpoints.fast_normalisers import (
    MOST_PLACEHOLDERS,
    Part,
    character_normaliser,
    normalisers,
    not_normal,
    of_type,
)
from vlm.errors import CheckpointError
from vlm.text.auto_tokenizer import dump, settings_of
from vlm.text.fast_vocabulary import FILE_NAME
from vlm.text.sentencepiece_vocabulary import SPACE, SentencePieceVocabulary
from vlm.text.tokenizer import SETTINGS_NAME, Tokenizer

_Piece = ModelProto.SentencePiece

_BRANCHES = 8  # characters that a pattern tries one after the other
_SEQUENCES = 1000  # of pieces, to be checked with and without spaces between them
_SMALLEST = 2.0**-126  # where sentencepiece begins to look for the highest score

_HARD = (
    "", " ", "   ", "a", " a ", "  a   cat  ", "a\tcat\nsits\r\nhere\r", "\n", "\u3000猫\u3000",
    "一只灰色的猫坐在垫子上。", "一只 cat 坐在 the mat 上", "A Photo of THE Great Wall, 1987!",
    "ＡＢＣ，１２３！ｃａｔ　？", "2024年12月25日 3.14159 100% 1,000,000", "①②③ ½ ㎏ ℃ ™ № ﬁ",
    "ｶﾞｷﾞ カ\u3099 が か\u3099 ﾊﾟ", "cafe\u0301 CAFE\u0301 café E\u0301\u0323 Q\u0307 n\u0303",
    "Tie\u0302\u0301ng Vie\u0323\u0302t a\u0323\u0302 ậ x\u0323\u0301\u0302", "ß ẞ ſ ΟΔΟΣ ΣΑΣ.",
    "İstanbul I\u0307stanbul", "한국어 \u1112\u1161\u11ab\u1100\u116e\u11a8", "שָׁלוֹם مُحَمَّد नमस्ते ก็ำ",
    "👩\u200d👩\u200d👧 👍🏽 A🏽 ❤\ufe0f 🇨🇳 1\ufe0f\u20e3 ☃", "𠮷野家 㐀㐁 𪚥 龘 﨎", "\u0301",
    "\u0301a ´", "哈哈哈哈哈 !!!!! ...... hahahaha ------ ======", "▁", "▁▁a▁", "a ▁ b", "a▁b▁▁c ",
    "\x00", "\x01", "a\x01b\x7f\u00ad\u200b\ufeff\ufffd", "<s>a</s>", "a </s> b<unk><pad></s",
    "<0x41><0x0A> <0xE4>x", "[CLS][MASK] <|endoftext|> <|blank_2|>",
    "http://example.com/~a?b=c&d=%20#e", "it's \"quoted\" — “quoted”… (a) [b] {c} a_b @x $5 ^ ` |",
)  # fmt: skip


def fast_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return a SentencePiece tokenizer as files of a fast tokenizer of Hugging Face, by name.

    `transformers.AutoTokenizer` reads the folder that they are written to, and the library
    `tokenizers` reads `tokenizer.json` alone. The ids, begin and end included, are the same on
    thousands of texts: every piece, random sequences of pieces, what the normaliser changes, and
    texts known to be hard. transformers' own converter gives other ids for a tenth of them.

    Texts that spell a special piece are read as the characters they are; therefore no piece is
    an added token, and transformers is set to split special tokens.

    One difference remains, and is not counted. Where a unigram model has `ha` and `haha`, it
    scores both orders of them in `hahaha` alike. sentencepiece adds in 32 bits, and takes the
    order that rounding favours; fast tokenizers add in 64 bits, and may take the other.

    Raises:
        CheckpointError: no fast tokenizer gives the same ids.
    """
    vocabulary = tokenizer.vocabulary
    assert isinstance(vocabulary, SentencePieceVocabulary)
    proto = vocabulary.proto
    if obstacle := _obstacle(tokenizer, proto):
        raise CheckpointError(f"no fast tokenizer gives the same ids: {obstacle}")
    definition = dump(_definition(tokenizer, proto))
    try:
        fast = RustTokenizer.from_buffer(definition)
    except Exception as error:  # the library raises nothing more definite
        raise CheckpointError(f"no fast tokenizer can be made: {error}") from error
    texts = list(dict.fromkeys(_texts_to_check(proto)))
    if differing := _differing(tokenizer, proto, fast, texts):
        raise CheckpointError(
            f"no fast tokenizer gives the same ids: {len(differing)} of {len(texts)} checked texts "
            f"differ, such as {differing[0]!r}"
        )
    settings = settings_of(tokenizer, unknown=of_type(proto, _Piece.UNKNOWN)[0])
    return {FILE_NAME: definition, SETTINGS_NAME: dump(settings)}


def _obstacle(tokenizer: Tokenizer, proto: ModelProto) -> str | None:
    """Return why there can be no such fast tokenizer, as far as it is known beforehand."""
    if proto.trainer_spec.model_type not in (TrainerSpec.UNIGRAM, TrainerSpec.BPE):
        return "the model is neither unigram nor BPE"
    if proto.trainer_spec.treat_whitespace_as_suffix:
        return "the model puts spaces after words"
    if of_type(proto, _Piece.UNUSED):
        return "the model has unused pieces"
    if tokenizer.config.cleaning == "clip":
        return "CLIP's cleaning has no equal there"
    changed = len(not_normal(proto))
    if changed > MOST_PLACEHOLDERS:
        return f"the normaliser would change {changed} user-defined pieces"
    return None


def _definition(tokenizer: Tokenizer, proto: ModelProto) -> Part:
    """Return the content of `tokenizer.json`."""
    unigram = proto.trainer_spec.model_type == TrainerSpec.UNIGRAM
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": normalisers(tokenizer.config.cleaning, proto),
        },
        "pre_tokenizer": _pre_tokenizer(proto),
        "post_processor": _markers(tokenizer),
        "decoder": {"type": "Sequence", "decoders": _decoders(proto)},
        "model": _unigram(proto) if unigram else _bpe(proto),
    }


def _pre_tokenizer(proto: ModelProto) -> Part | None:
    """Return what splits a normalised text before the model sees it."""
    bpe = proto.trainer_spec.model_type == TrainerSpec.BPE
    whole = of_type(proto, _Piece.USER_DEFINED) if bpe else []
    patterns = [_longest_of(whole)] if whole else []
    # Fast models find every piece that is spelt, sentencepiece only those that are not special.
    if (whole or not bpe) and (cuts := _cuts(proto)):
        patterns.append(cuts)
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": splits} if splits else None


def _longest_of(words: Collection[str]) -> str:
    """Return a pattern of the longest of some words, quick for many thousands of them."""
    branches = []
    for first, group in groupby(sorted(filter(None, words)), key=lambda word: word[0]):
        alike = list(group)
        # In their order the first and the last share what all of them share.
        ends = zip(alike[0], alike[-1], strict=False)
        shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], ends))
        rest = _longest_of([word[len(shared) :] for word in alike])
        branches.append((first, _escaped(shared) + rest))
    if not branches:
        return ""
    return f"(?:{_any_of(branches)}){'?' if '' in words else ''}"


def _any_of(branches: Sequence[tuple[str, str]]) -> str:
    """Return a pattern of patterns, each with the character it begins with, in their order."""
    if len(branches) <= _BRANCHES:
        return "|".join(pattern for _, pattern in branches)
    middle = len(branches) // 2
    lower, upper = branches[:middle], branches[middle:]
    # A lookahead for a range of first characters halves the branches: a search in log time, where
    # alternatives would be tried one after the other for every character of a text.
    low, high = _escaped(lower[0][0]), _escaped(lower[-1][0])
    return f"(?=[{low}-{high}])(?:{_any_of(lower)})|{_any_of(upper)}"


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in r"\^$.*+?()[]{}|/-" else c for c in text)


def _cuts(proto: ModelProto) -> str:
    """Return a pattern that cuts the spelling of every special piece where no piece crosses."""
    ordinary = set(of_type(proto, _Piece.NORMAL, _Piece.USER_DEFINED))
    names = [[name] for name in of_type(proto, _Piece.CONTROL, _Piece.UNKNOWN)]
    names.append(of_type(proto, _Piece.BYTE))  # which are all cut at the same place
    # Only pieces that hold two characters of a special name can cross a cut of it, so those alone
    # are kept, by the two characters around each place where they could.
    pairs = {a + b for name in chain.from_iterable(names) for a, b in pairwise(name)}
    crossing: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for piece in ordinary:
        for place in range(1, len(piece)):
            if (pair := piece[place - 1 : place + 1]) in pairs:
                crossing[pair].append((piece[:place], piece[place:]))

    def harmless(name: str, place: int) -> bool:
        left, right = name[:place], name[place:]
        # Without bytes, two unknown characters side by side are one unknown piece.
        known = proto.trainer_spec.byte_fallback or left[-1] in ordinary or right[0] in ordinary
        return known and not any(
            (before.endswith(left) or left.endswith(before))
            and (after.startswith(right) or right.startswith(after))
            for before, after in crossing[left[-1] + right[0]]
        )

    cuts: dict[str, list[str]] = defaultdict(list)
    for alike in names:
        places = range(1, min(map(len, alike), default=1))
        place = next((p for p in places if all(harmless(name, p) for name in alike)), 0)
        for name in alike if place else ():
            cuts[name[:place]].append(name[place:])
    # An empty match between both halves: the split consumes nothing.
    return "|".join(f"(?<={_escaped(a)})(?={_longest_of(b)})" for a, b in sorted(cuts.items()))


def _unigram(proto: ModelProto) -> Part:
    scores = [piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL]
    lowest, highest = min(scores, default=0.0), max(scores, default=0.0)

    def score(piece: Any) -> float:
        if piece.type == _Piece.USER_DEFINED:
            # sentencepiece's own score of such a piece, by its length in bytes.
            return float(len(piece.piece.encode()) * max(highest, _SMALLEST) - 0.1)
        # What is no piece of a text must not be lower: the unknown scores ten below the lowest.
        return float(piece.score if piece.type == _Piece.NORMAL else lowest)

    return {
        "type": "Unigram",
        "unk_id": [piece.type for piece in proto.pieces].index(_Piece.UNKNOWN),
        "vocab": [[piece.piece, score(piece)] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: ModelProto) -> Part:
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    # Of two ways to the same piece sentencepiece takes the one more to the left, which in a run
    # of one character is that of the longer left part.
    merges = [
        (piece[:place], piece[place:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for place in range(len(piece) - 1, 0, -1)
        if piece[:place] in scores and piece[place:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": of_type(proto, _Piece.UNKNOWN)[0],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        # User-defined pieces are not merged, but found whole after they were split off.
        "ignore_merges": bool(of_type(proto, _Piece.USER_DEFINED)),
        "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
        "merges": merges,
    }


def _markers(tokenizer: Tokenizer) -> Part:
    """Return the post-processor that puts begin and end around a text."""
    begin, end = tokenizer.config.begin_of_text, tokenizer.config.end_of_text
    ids = {begin: tokenizer.special_ids.begin_of_text, end: tokenizer.special_ids.end_of_text}

    def marked(sequence: str, type_id: int) -> list[Part]:
        text = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        before, after = (
            [{"SpecialToken": {"id": name, "type_id": type_id}}] for name in (begin, end)
        )
        return [*(before if begin is not None else []), *text, *after]

    return {
        "type": "TemplateProcessing",
        "single": marked("A", 0),
        "pair": [*marked("A", 0), *marked("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [token_id], "tokens": [name]}
            for name, token_id in ids.items()
            if name is not None
        },
    }


def _decoders(proto: ModelProto) -> list[Part]:
    first = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *(first if proto.normalizer_spec.add_dummy_prefix else []),
    ]


def _texts_to_check(proto: ModelProto) -> list[str]:
    """Return every piece, sequences of pieces, what the normaliser replaces, and hard texts."""
    rng = random.Random(0)
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    rows = [rng.choices(pieces, k=8) for _ in range(_SEQUENCES)]
    sequences = ["".join(row) for row in rows] + [" ".join(row) for row in rows]
    keys = _normalised(proto)
    joined = ["猫".join(keys[start : start + 8]) for start in range(0, len(keys), 8)]
    return [*_HARD, *sequences, *joined, *pieces]


def _normalised(proto: ModelProto) -> list[str]:
    """Return the characters that the normaliser changes, and letters with their marks apart."""
    # Without halves of surrogate pairs; planes 3 to 13 have nothing that normalisers change.
    characters = list(map(chr, chain(range(1, 0xD800), range(0xE000, 0x30000))))
    # Beyond U+FFFF, and where NFKC changes the letter itself, marks are only nearly right: see
    # `fast_normalisers._characters`.
    apart = (unicodedata.normalize("NFD", each) for each in characters if each <= "\uffff")
    letters = [text for text in apart if text[1:] and unicodedata.is_normalized("NFKC", text[0])]
    candidates = characters + letters
    normal = character_normaliser(proto.normalizer_spec).normalize(candidates)
    return [text for text, other in zip(candidates, normal, strict=True) if text != other]


def _differing(
    tokenizer: Tokenizer, proto: ModelProto, fast: RustTokenizer, texts: Sequence[str]
) -> list[str]:
    """Return the texts that a fast tokenizer splits otherwise, but for ties."""
    special = tokenizer.special_ids
    begin = [] if special.begin_of_text is None else [special.begin_of_text]
    unigram = proto.trainer_spec.model_type == TrainerSpec.UNIGRAM
    scores = {
        index: piece.score
        for index, piece in enumerate(proto.pieces)
        if unigram and piece.type == _Piece.NORMAL
    }
    differing = []
    for text, row in zip(texts, tokenizer.split(texts), strict=True):
        expected, ids = [*begin, *row, special.end_of_text], fast.encode(text).ids
        if ids != expected and not _tied(ids, expected, scores):
            differing.append(text)
    return differing


def _tied(ids: Sequence[int], expected: Sequence[int], scores: Mapping[int, float]) -> bool:
    """Return whether pieces with scores were put together otherwise, at the same sum in 32 bits."""
    ours, theirs = Counter(expected), Counter(ids)
    sums = []
    for only in ((ours - theirs).elements(), (theirs - ours).elements()):
        pieces = list(only)
        if not scores or any(token_id not in scores for token_id in pieces):
            return False
        sums.append(math.fsum(scores[token_id] for token_id in pieces))
    total = math.fsum(scores.get(token_id, 0.0) for token_id in expected)
    # One rounding of 32 bits, 2 ** -23 of the running sum, for every piece that was added.
    return abs(sums[0] - sums[1]) <= 2.0**-23 * len(expected) * abs(total)
