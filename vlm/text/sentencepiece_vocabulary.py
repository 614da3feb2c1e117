"""Vocabularies in SentencePiece's own `.model` files, unigram or BPE."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
    ModelProto,
    TrainerSpec,
)
from typing_extensions import override

from vlm.errors import TokenizerError
from vlm.text.vocabulary import NewPiece, Vocabulary, merged_to

FILE_NAME = "sentencepiece.model"
SPACE = "▁"
"""SentencePiece's sign for a space."""

_Piece = ModelProto.SentencePiece


class SentencePieceVocabulary(Vocabulary):
    """Pieces of a SentencePiece model (Kudo and Richardson 2018), the content of a `.model` file.

    Raises:
        TokenizerError: it is not one.
    """

    kind: ClassVar[str] = "sentencepiece"
    file_name: ClassVar[str] = FILE_NAME

    def __init__(self, model: bytes) -> None:
        super().__init__(model)
        try:
            if not model:
                raise RuntimeError("empty")  # which sentencepiece takes for "load it later"
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.proto = ModelProto.FromString(model)
        except (RuntimeError, DecodeError) as error:
            raise TokenizerError(f"not a SentencePiece model ({len(model)} bytes)") from error

    @override
    def __len__(self) -> int:
        return len(self.proto.pieces)

    @property
    @override
    def unknown_id(self) -> int | None:
        return None if self.proto.trainer_spec.byte_fallback else int(self._processor.unk_id())

    @property
    @override
    def special_pieces(self) -> Mapping[str, str]:
        ids = {
            "begin_of_text": self._processor.bos_id(),
            "end_of_text": self._processor.eos_id(),
            "padding": self._processor.pad_id(),
        }
        return {role: self.proto.pieces[i].piece for role, i in ids.items() if i >= 0}

    @override
    def id_of(self, piece: str) -> int | None:
        token_id = int(self._processor.piece_to_id(piece))
        return token_id if self.proto.pieces[token_id].piece == piece else None

    @override
    def pieces(self) -> list[str]:
        return [piece.piece for piece in self.proto.pieces]

    @override
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = self._processor.encode(list(texts), out_type=int)
        return rows

    @override
    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        encodings = self._processor.encode(list(texts), return_type="offset_mapping")
        return [_filled(encoding["offsets"]) for encoding in encodings]

    @override
    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    @override
    def with_pieces(self, new: Sequence[NewPiece]) -> "SentencePieceVocabulary":
        """Return the same vocabulary with pieces added after its last id.

        In a unigram model a piece scores the logarithm of its probability, as the old ones do,
        but no less than the worst of them, because what is unknown scores by that one.
        In a BPE model, whose scores are an order of merges, the new pieces are found before
        any merge, the longest from the left. A text that holds none of them keeps its ids.
        """
        self._check_new(new)
        proto = ModelProto.FromString(self.content)
        unigram = proto.trainer_spec.model_type == TrainerSpec.UNIGRAM
        lowest = min((p.score for p in proto.pieces if p.type == _Piece.NORMAL), default=-math.inf)
        for piece in new:
            proto.pieces.add(
                piece=piece.text,
                score=max(math.log(piece.probability), lowest) if unigram else 0.0,
                type=_Piece.NORMAL if unigram else _Piece.USER_DEFINED,
            )
        proto.trainer_spec.vocab_size = len(proto.pieces)
        return SentencePieceVocabulary(proto.SerializeToString(deterministic=True))

    @override
    def reduced_to(self, kept: Sequence[int]) -> tuple["SentencePieceVocabulary", list[int]]:
        """Return a vocabulary of some pieces only, in the same order, and the ids it kept.

        Control pieces, bytes, the unknown piece, that of a single space and, in a BPE model, what
        is merged to the kept ones are kept as well. In a unigram model it is the worst piece,
        because what is unknown scores by it.
        """
        space = self.id_of(SPACE)  # which bytes could not say
        needed = set(kept) | ({space} - {None})
        if self.proto.trainer_spec.model_type == TrainerSpec.BPE:
            needed |= self._merged_from(kept)
        if self.proto.trainer_spec.model_type == TrainerSpec.UNIGRAM:
            normal = [i for i, p in enumerate(self.proto.pieces) if p.type == _Piece.NORMAL]
            needed.add(min(normal, key=lambda i: self.proto.pieces[i].score))
        always = (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.BYTE)
        proto = ModelProto.FromString(self.content)
        ids = [i for i, p in enumerate(proto.pieces) if i in needed or p.type in always]
        pieces = [proto.pieces[i] for i in ids]
        new_id = {old: new for new, old in enumerate(ids)}
        del proto.pieces[:]
        proto.pieces.extend(pieces)
        spec = proto.trainer_spec
        spec.vocab_size = len(pieces)
        for field in ("unk_id", "bos_id", "eos_id", "pad_id"):
            setattr(spec, field, new_id.get(getattr(spec, field), -1))
        return SentencePieceVocabulary(proto.SerializeToString(deterministic=True)), ids

    def _merged_from(self, ids: Sequence[int]) -> set[int]:
        """Return all that BPE merges on its way to `ids`."""
        id_and_score = {
            piece.piece: (index, piece.score)
            for index, piece in enumerate(self.proto.pieces)
            if piece.type == _Piece.NORMAL
        }

        def place_of(left: str, right: str) -> float | None:
            found = id_and_score.get(left + right)
            return None if found is None else -found[1]

        reached: set[int] = set()
        for token_id in ids:
            piece = self.proto.pieces[token_id]
            if piece.type == _Piece.NORMAL:
                parts = [*piece.piece, *merged_to(piece.piece, place_of)]
                reached.update(id_and_score[part][0] for part in parts if part in id_and_score)
        return reached


def _filled(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Widen empty spans: of the pieces of one character, the library lets the last have it."""
    filled: list[tuple[int, int]] = []
    for start, end in reversed(spans):
        shared = start == end and filled and filled[-1][0] == start
        filled.append(filled[-1] if shared else (start, end))
    return filled[::-1]
