"""The SentencePiece back end of the tokenizer contract."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import sentencepiece

from vlm.errors import TokenizerError
from vlm.files import write_file
from vlm.text.tokenizer import DESCRIPTION_NAME, TokenBatch, pad

logger = logging.getLogger(__name__)

_MODEL_NAME = "sentencepiece.model"


class SentencePieceTokenizer:
    """Ids of a SentencePiece model between its begin- and end-of-text ids.

    Args:
        model: The serialized SentencePiece model; it must define padding, begin and end ids.
        context_length: Longest text in tokens, begin and end included; at least 3.

    Raises:
        TokenizerError: the model cannot be read or lacks one of the three ids.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes, *, context_length: int) -> None:
        if context_length < 3:
            raise TokenizerError(f"context_length is {context_length}; expected at least 3")
        try:
            if not model:
                raise RuntimeError("empty")  # which sentencepiece takes for "load it later"
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"not a SentencePiece model ({len(model)} bytes)") from error
        special = {
            "padding": self._processor.pad_id(),
            "begin": self._processor.bos_id(),
            "end": self._processor.eos_id(),
        }
        missing = [name for name, token_id in special.items() if token_id < 0]
        if missing:
            raise TokenizerError(f"the SentencePiece model has no {' and no '.join(missing)} id")
        self._model = model
        self._context_length = context_length
        self._encoded = 0
        self._truncated = 0

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in [0, vocab_size)."""
        return int(self._processor.vocab_size())

    @property
    def context_length(self) -> int:
        """Longest text in tokens, begin and end included."""
        return self._context_length

    @property
    def pad_id(self) -> int:
        """Id that fills a text up to the length of its batch."""
        return int(self._processor.pad_id())

    @property
    def end_of_text_id(self) -> int:
        """Id of the last token of every text."""
        return int(self._processor.eos_id())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model and of the description that goes with it."""
        return hashlib.sha256(self._model + self._description()).hexdigest()

    @property
    def truncated_share(self) -> float:
        """Share in [0, 1] of the texts encoded so far that lost their tail."""
        return self._truncated / self._encoded if self._encoded else 0.0

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Turn texts into ids; what is longer than `context_length` loses its tail, not its end.

        Raises:
            TokenizerError: a text is not valid Unicode.
        """
        try:
            rows = self._processor.encode(list(texts), out_type=int)
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"the texts are not valid Unicode: {error}") from error
        longest = self._context_length - 2
        truncated = sum(len(row) > longest for row in rows)
        self._encoded += len(rows)
        if truncated and not self._truncated:
            logger.warning(
                "%d of %d texts are longer than %d tokens and lost their tail",
                truncated, len(rows), self._context_length,
            )  # fmt: skip
        self._truncated += truncated
        begin, end = int(self._processor.bos_id()), self.end_of_text_id
        return pad([[begin, *row[:longest], end] for row in rows], self.pad_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn the ids of one text back into a string, without its markers and padding."""
        special = {self.pad_id, int(self._processor.bos_id()), self.end_of_text_id}
        return str(self._processor.decode([int(i) for i in ids if int(i) not in special]))

    def save(self, folder: Path) -> None:
        """Write the model and its description into `folder`."""
        write_file(folder / _MODEL_NAME, self._model)
        write_file(folder / DESCRIPTION_NAME, self._description())

    @classmethod
    def load(cls, folder: Path, description: Mapping[str, object]) -> "SentencePieceTokenizer":
        """Read what `save` wrote.

        Raises:
            TokenizerError: the model is missing or the description is not valid.
        """
        context_length = description.get("context_length")
        if not isinstance(context_length, int):
            raise TokenizerError(
                f"{folder / DESCRIPTION_NAME}: context_length is {context_length!r}; "
                "expected an integer"
            )
        path = folder / _MODEL_NAME
        if not path.is_file():
            raise TokenizerError(f"{path} is missing")
        return cls(path.read_bytes(), context_length=context_length)

    def _description(self) -> bytes:
        record = {"kind": self.kind, "context_length": self._context_length}
        return (json.dumps(record, indent=1) + "\n").encode()
