"""The tokenizer contract: strings in, a padded batch of ids out; and reading one from disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vlm.errors import TokenizerError

DESCRIPTION_NAME = "vlm_tokenizer.json"


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids padded on the right to the longest text of the batch, and no further."""

    ids: Int64[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    """True at the tokens of a text, false at padding; the last true one is the end of text."""

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the same batch with its tensors on `device`."""
        return TokenBatch(
            self.ids.to(device, non_blocking=True), self.mask.to(device, non_blocking=True)
        )


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer offers, whatever its back end."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in [0, vocab_size)."""

    @property
    def context_length(self) -> int:
        """Longest text in tokens, with its begin and end markers; longer texts lose their tail."""

    @property
    def pad_id(self) -> int:
        """Id that fills a text up to the length of its batch."""

    @property
    def end_of_text_id(self) -> int:
        """Id of the last token of every text."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Turn texts into ids; an empty list gives a batch of shape (0, 0)."""

    def decode(self, ids: Sequence[int]) -> str:
        """Turn the ids of one text back into a string, without its markers and padding."""

    def save(self, folder: Path) -> None:
        """Write everything `load_tokenizer` needs into `folder`."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer that `Tokenizer.save` wrote.

    Raises:
        TokenizerError: the folder holds no tokenizer that this version knows.
    """
    # The back ends import this module for the contract.
    from vlm.text.sentencepiece_tokenizer import SentencePieceTokenizer

    path = folder / DESCRIPTION_NAME
    if not path.is_file():
        raise TokenizerError(f"{folder} holds no tokenizer: expected the file {DESCRIPTION_NAME}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        kind = description["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{path} does not describe a tokenizer: {error}") from error
    if kind != SentencePieceTokenizer.kind:
        raise TokenizerError(
            f"{path} describes a {kind!r} tokenizer; this version reads "
            f"{SentencePieceTokenizer.kind!r}"
        )
    return SentencePieceTokenizer.load(folder, description)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> TokenBatch:
    """Stack rows of ids into one batch as long as the longest row."""
    length = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = True
    return TokenBatch(ids, mask)
