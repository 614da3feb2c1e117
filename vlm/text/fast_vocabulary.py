"""Vocabularies in the `tokenizer.json` of Hugging Face, run by the Rust library `tokenizers`."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, ClassVar

from tokenizers import AddedToken, Encoding, Tokenizer as RustTokenizer
from tokenizers.models import Unigram
from typing_extensions import override

from vlm.errors import TokenizerError
from vlm.text.vocabulary import NewPiece, Vocabulary, merged_to

FILE_NAME = "tokenizer.json"

_BYTE_OR_SPACE = re.compile("<0x..>|▁")  # the piece of a space, which bytes could not say
_MOST_WORDS = 200_000  # whose ids are kept, some 40 MiB
_TEXTS_A_THREAD = 512  # fewer are not worth a thread


class FastVocabulary(Vocabulary):
    """Pieces of a `tokenizer.json`: BPE, WordPiece, Unigram or whole words, as the file says.

    What the file says of begin and end markers, truncation and padding is not used. Special
    pieces that a text happens to spell are read as the characters they are, except where the
    file keeps them whole like any word, as CLIP's does, or a unigram model has them among its
    pieces, as XLM-R's does.

    Raises:
        TokenizerError: `definition` is not the content of a `tokenizer.json`.
    """

    kind: ClassVar[str] = "tokenizer.json"
    file_name: ClassVar[str] = FILE_NAME

    def __init__(self, definition: bytes) -> None:
        super().__init__(definition)
        try:
            self._rust = RustTokenizer.from_buffer(definition)
        except Exception as error:  # the library raises nothing more definite
            raise TokenizerError(
                f"not a tokenizer.json ({len(definition)} bytes): {error}"
            ) from error
        self._rust.no_truncation()
        self._rust.no_padding()
        self._rust.encode_special_tokens = True
        self._special_words = self._find_special_words()
        self._drops_spaces = self._is_alike_between_spaces()
        self._words: dict[str, list[int]] = {}
        highest = max(self._rust.get_vocab(with_added_tokens=True).values(), default=-1)
        self._size = highest + 1
        if isinstance(self._rust.model, Unigram):  # the library shows neither setting
            model = self._record()["model"]
            self._unknown_id = None if model.get("byte_fallback") else model.get("unk_id")
        else:
            piece = self._rust.model.unk_token
            self._unknown_id = None if piece is None else self.id_of(piece)

    @override
    def __len__(self) -> int:
        return self._size

    @property
    @override
    def unknown_id(self) -> int | None:
        return self._unknown_id

    @override
    def id_of(self, piece: str) -> int | None:
        token_id: int | None = self._rust.token_to_id(piece)
        return token_id

    @override
    def pieces(self) -> list[str]:
        pieces = [""] * self._size
        for piece, token_id in self._rust.get_vocab(with_added_tokens=True).items():
            pieces[token_id] = piece
        return pieces

    @override
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Split texts into pieces, without begin and end; large batches on every core."""
        if not self._drops_spaces:
            return self._encode_whole(texts)
        # Between spaces English repeats itself; Chinese does not, and has no spaces.
        english = [text.isascii() for text in texts]
        words = iter(
            self._encode_words([t for t, is_so in zip(texts, english, strict=True) if is_so])
        )
        others = iter(
            self._encode_whole([t for t, is_so in zip(texts, english, strict=True) if not is_so])
        )
        return [next(words if is_so else others) for is_so in english]

    def _encode_words(self, texts: Sequence[str]) -> list[list[int]]:
        """Split texts at spaces, and only those words that are new to this process further."""
        split = [text.split(" ") for text in texts]
        known = self._words
        new = list({word for row in split for word in row if word not in known})
        if len(known) + len(new) > _MOST_WORDS:
            known = self._words = {}
            new = list({word for row in split for word in row})
        known.update(zip(new, self._encode_whole(new), strict=True))
        return [list(chain.from_iterable([known[word] for word in row])) for row in split]

    def _encode_whole(self, texts: Sequence[str]) -> list[list[int]]:
        rows = self._encode_on_threads(texts)
        for index, text in enumerate(texts):
            if any(special in text for special in self._special_words):
                rows[index] = [token_id for token_id, _ in self._with_special_words(text)]
        return rows

    @override
    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        rows = [encoding.offsets for encoding in self._encodings(self._rust.encode_batch, texts)]
        for index, text in enumerate(texts):
            if any(special in text for special in self._special_words):
                rows[index] = [span for _, span in self._with_special_words(text)]
        return rows

    @override
    def decode(self, ids: Sequence[int]) -> str:
        # The library's `Strip` panics on an empty text.
        return str(self._rust.decode(list(ids), skip_special_tokens=False)) if ids else ""

    @override
    def with_pieces(self, new: Sequence[NewPiece]) -> "FastVocabulary":
        """Return the same vocabulary with pieces added after its last id.

        The new pieces are found first, the longest from the left, wherever they stand in a
        text; what is between them is split as before. So a text that holds none of them keeps
        its ids, and a piece has one id wherever it stands in a word.
        """
        self._check_new(new)
        rust = RustTokenizer.from_buffer(self.content)
        normalised = rust.normalizer is not None
        rust.add_tokens([AddedToken(piece.text, normalized=normalised) for piece in new])
        if [rust.token_to_id(piece.text) for piece in new] != [
            *range(len(self), len(self) + len(new))
        ]:
            raise TokenizerError("the vocabulary has gaps in its ids, which new pieces would get")
        return FastVocabulary(rust.to_str().encode())

    @override
    def reduced_to(self, kept: Sequence[int]) -> tuple["FastVocabulary", list[int]]:
        """Return a vocabulary of some pieces only, in the same order, and the ids it kept.

        Texts of the kept pieces are split as before; only a word that a WordPiece model did not
        know, because it began with a piece that is gone, may be split now. What is merged to kept
        pieces, single bytes, with them the piece of a space, and special pieces are kept as well.
        In a unigram model it is the worst piece, because what is unknown scores by it.
        """
        definition = self._record()
        ids = sorted(self._with_what_they_need(kept, definition))
        new_id = {old: new for new, old in enumerate(ids)}
        _reduce(definition["model"], new_id)
        definition["added_tokens"] = [
            added | {"id": new_id[added["id"]]}
            for added in definition["added_tokens"]
            if added["id"] in new_id
        ]
        definition["post_processor"] = None  # it names special pieces by their old ids
        return FastVocabulary(json.dumps(definition, ensure_ascii=False).encode()), ids

    def _encode_on_threads(self, texts: Sequence[str]) -> list[list[int]]:
        # The library's own threads are unusable after a fork, and open_clip turns them off.
        threads = min(os.cpu_count() or 1, len(texts) // _TEXTS_A_THREAD)
        if threads < 2:
            return self._encode_batch(texts)
        size = -(-len(texts) // threads)
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as pool:
            return list(chain.from_iterable(pool.map(self._encode_batch, parts)))

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._encodings(self._rust.encode_batch_fast, texts)
        return [encoding.ids for encoding in encodings]

    def _encodings(
        self, encode_batch: Callable[..., list[Encoding]], texts: Sequence[str]
    ) -> list[Encoding]:
        try:
            return encode_batch(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises nothing more definite
            raise TokenizerError(f"the tokenizer cannot split a text: {error}") from error

    def _with_special_words(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Return the ids of a text and their spans, special pieces that are words as one."""
        encoding = self._rust.encode(text, add_special_tokens=False)
        pieces = zip(encoding.word_ids, encoding.offsets, encoding.ids, strict=True)
        row: list[tuple[int, tuple[int, int]]] = []
        for _, word in groupby(pieces, key=itemgetter(0)):
            _, offsets, ids = zip(*word, strict=True)
            whole = (offsets[0][0], offsets[-1][1])
            special = self._special_words.get(text[slice(*whole)])
            row += zip(ids, offsets, strict=True) if special is None else [(special, whole)]
        return row

    def _is_alike_between_spaces(self) -> bool:
        """Say whether what stands between two spaces has the same pieces in every text."""
        before = self._rust.pre_tokenizer
        if before is None or self._rust.normalizer is not None:
            return False
        drops = [word for word, _ in before.pre_tokenize_str(" x  y ")] == ["x", "y"]
        return drops and not any(
            " " in token.content or token.lstrip or token.rstrip or token.single_word
            for token in self._rust.get_added_tokens_decoder().values()
        )

    def _find_special_words(self) -> dict[str, int]:
        """Find the ids of the special pieces that are words to the pre-tokenizer."""
        if self._rust.pre_tokenizer is None:
            return {}
        return {
            token.content: token_id
            for token_id, token in self._rust.get_added_tokens_decoder().items()
            if token.special
            and [word for word, _ in self._rust.pre_tokenizer.pre_tokenize_str(token.content)]
            == [token.content]
        }

    def _record(self) -> dict[str, Any]:
        """Return the file as the library writes it today: older files lack parts of it."""
        record: dict[str, Any] = json.loads(self._rust.to_str())
        return record

    def _with_what_they_need(self, kept: Iterable[int], definition: dict[str, Any]) -> set[int]:
        needed = set(kept) | {a["id"] for a in definition["added_tokens"] if a["special"]}
        if self.unknown_id is not None:
            needed.add(self.unknown_id)
        model = definition["model"]
        if model["type"] == "Unigram":
            scores = [score for _, score in model["vocab"]]
            needed |= {scores.index(min(scores)), model["unk_id"]} - {None}
            if model["byte_fallback"]:
                pieces = enumerate(self.pieces())
                needed.update(i for i, piece in pieces if _BYTE_OR_SPACE.fullmatch(piece))
        if model["type"] == "BPE":
            needed |= _merged_from(needed, model)
        return needed


def _reduce(model: dict[str, Any], new_id: Mapping[int, int]) -> None:
    """Leave in the `model` of a `tokenizer.json` only the ids that have a new one."""
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new_id]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_id[model["unk_id"]]
        return
    if model["type"] not in ("BPE", "WordPiece", "WordLevel"):
        raise TokenizerError(f"cannot reduce a vocabulary of the kind {model['type']}")
    if model["type"] == "BPE" and model.get("continuing_subword_prefix"):
        raise TokenizerError("cannot reduce byte-pair merges that mark the inside of a word")
    vocabulary = {piece: new_id[i] for piece, i in model["vocab"].items() if i in new_id}
    model["vocab"] = vocabulary
    if model["type"] == "BPE":
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in vocabulary and right in vocabulary and left + right in vocabulary
        ]


def _merged_from(ids: Iterable[int], model: Mapping[str, Any]) -> set[int]:
    """Return all that BPE merges on its way to `ids`, and the symbols it starts from."""
    vocabulary: dict[str, int] = model["vocab"]
    places = {(left, right): place for place, (left, right) in enumerate(model["merges"])}
    merged = {left + right for left, right in places}
    # What no merge makes is what texts are first split into, such as bytes.
    reached = {i for piece, i in vocabulary.items() if piece not in merged}
    piece_of = {i: piece for piece, i in vocabulary.items()}
    suffix = model.get("end_of_word_suffix") or ""
    for piece in merged.intersection(map(piece_of.get, ids)):
        symbols = list(piece)
        if suffix and piece.endswith(suffix):  # of a word's last character
            *symbols, last = piece.removesuffix(suffix)
            symbols.append(last + suffix)
        parts = merged_to(symbols, lambda left, right: places.get((left, right)))
        reached.update(vocabulary[part] for part in parts)
    return reached
