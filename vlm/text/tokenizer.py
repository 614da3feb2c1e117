"""`Tokenizer`: strings in, a padded batch of ids out; the same for every kind of vocabulary."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from vlm.errors import TokenizerError
from vlm.files import write_file
from vlm.text.cleaning import CLEANING, RESTORING
from vlm.text.config import TokenizerConfig
from vlm.text.fast_vocabulary import FILE_NAME, FastVocabulary
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

DESCRIPTION_NAME = "vlm_tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
"""Beside `tokenizer.json`: what transformers puts around the ids."""

_FAST_FILES = (FILE_NAME, SETTINGS_NAME)

_KINDS: Mapping[str, type[FastVocabulary] | type[SentencePieceVocabulary]] = {
    kind.kind: kind for kind in (SentencePieceVocabulary, FastVocabulary)
}


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids padded on the right, to the longest text of the batch unless asked otherwise."""

    ids: Int64[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    """True at the tokens of a text, false at padding; the last true one is the end of text."""
    count: int | None = None
    """How many tokens the mask has. Counted on the host; None where a device would have to be
    waited for."""

    def __post_init__(self) -> None:
        if self.count is None and self.mask.device.type == "cpu":
            object.__setattr__(self, "count", int(self.mask.sum()))

    def to(self, device: torch.device) -> "TokenBatch":
        """Return the same batch with its tensors on `device`."""
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def moved(self, move: Callable[[Tensor], Tensor]) -> "TokenBatch":
        """Return the same batch with its tensors elsewhere."""
        return TokenBatch(move(self.ids), move(self.mask), self.count)


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids around a text, by role."""

    begin_of_text: int | None
    end_of_text: int
    padding: int
    unknown: int | None
    """Stands for a character without a piece; None where bytes do."""


class Tokenizer:
    """Turns texts into ids of a vocabulary, between a begin and an end, and truncates them.

    `fast_files` are `tokenizer.json` and `tokenizer_config.json`, by name, with which transformers
    gives the same ids: of a SentencePiece model, where they were exported.

    Raises:
        TokenizerError: the vocabulary has no piece of a name that `config` gives.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        config: TokenizerConfig,
        *,
        fast_files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.config = config
        self.fast_files = dict(fast_files or {})
        begin = config.begin_of_text
        self.special_ids = SpecialIds(
            begin_of_text=None if begin is None else self._id_of("begin-of-text", begin),
            end_of_text=self._id_of("end-of-text", config.end_of_text),
            padding=self._id_of("padding", config.padding),
            unknown=vocabulary.unknown_id,
        )
        self._encoded = 0
        self._truncated = 0

    def _id_of(self, role: str, piece: str) -> int:
        token_id = self.vocabulary.id_of(piece)
        if token_id is None:
            raise TokenizerError(f"the vocabulary has no {role} piece {piece!r}")
        return token_id

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in [0, vocab_size)."""
        return len(self.vocabulary)

    @property
    def context_length(self) -> int:
        """Longest text in tokens, begin and end included."""
        return self.config.context_length

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which ids a text gets."""
        digest = hashlib.sha256(self._description())
        for name, content in sorted(self.vocabulary.files().items()):
            digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    @property
    def truncated(self) -> int:
        """Number of texts encoded so far that were truncated."""
        return self._truncated

    @property
    def truncated_share(self) -> float:
        """Fraction in [0, 1] of the texts encoded so far that were truncated."""
        return self._truncated / self._encoded if self._encoded else 0.0

    def encode(self, texts: Sequence[str], *, pad_to: int | None = None) -> TokenBatch:
        """Turn texts into ids; the first truncation is a warning, all are counted.

        Args:
            texts: Any strings; an empty list gives a batch of shape (0, 0).
            pad_to: Length of the batch; None for that of its longest text.

        Raises:
            TokenizerError: a text is not valid Unicode, or `pad_to` is shorter than a text.
        """
        begin = () if self.special_ids.begin_of_text is None else (self.special_ids.begin_of_text,)
        room = self.context_length - len(begin) - 1
        rows = self.split(texts)
        self._count_truncated(sum(len(row) > room for row in rows), len(rows))
        cut = slice(-room, None) if self.config.truncation == "left" else slice(room)
        end = self.special_ids.end_of_text
        return pad([[*begin, *row[cut], end] for row in rows], self.special_ids.padding, pad_to)

    def split(self, texts: Iterable[str]) -> list[list[int]]:
        """Turn texts into the ids of their pieces: whole, and without begin, end and padding.

        Raises:
            TokenizerError: a text is not a string of valid Unicode, or there is no list of them.
        """
        if isinstance(texts, str):
            raise TokenizerError(f"the texts are one string, {texts[:40]!r}; expected a list")
        clean = CLEANING[self.config.cleaning]
        try:
            cleaned = [clean(text) for text in texts]
            "".join(cleaned).encode()  # refuses half of a surrogate pair
        except (AttributeError, TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"the texts are not strings of valid Unicode: {error}") from error
        return self.vocabulary.encode(cleaned)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn the ids of one text back into a string, without its markers and padding."""
        row = [int(token_id) for token_id in ids]
        if row[:1] == [self.special_ids.begin_of_text]:
            row = row[1:]
        end = self.special_ids.end_of_text
        if end in row:  # padding comes after it; a padding piece before it is a part of the text
            row = row[: len(row) - 1 - row[::-1].index(end)]
            while row[-1:] == [end]:  # where it is the padding as well
                row.pop()
        restore = RESTORING.get(self.config.cleaning)
        text = self.vocabulary.decode(row)
        return restore(text) if restore else text

    def save(self, folder: Path) -> None:
        """Write everything that `load_tokenizer` needs into `folder`."""
        files = {**self.fast_files, **self.vocabulary.files()}
        for name in set(_FAST_FILES) - files.keys():
            (folder / name).unlink(missing_ok=True)  # of another tokenizer, saved before
        for name, content in (files | {DESCRIPTION_NAME: self._description()}).items():
            write_file(folder / name, content)

    def _count_truncated(self, truncated: int, encoded: int) -> None:
        if truncated and not self._truncated:
            lost = "head" if self.config.truncation == "left" else "tail"
            logger.warning(
                "%d of %d texts (%.1f %%) are longer than %d tokens and lost their %s",
                truncated, encoded, 100 * truncated / encoded, self.context_length, lost,
            )  # fmt: skip
        self._encoded += encoded
        self._truncated += truncated

    def _description(self) -> bytes:
        record = {"kind": self.vocabulary.kind} | asdict(self.config)
        return (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer folder: what `Tokenizer.save` wrote, or files described by hand.

    Raises:
        TokenizerError: the folder holds no tokenizer that this version knows, or a damaged one.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION_NAME
    if not path.is_file():
        raise TokenizerError(f"{folder} holds no tokenizer: expected the file {DESCRIPTION_NAME}")
    try:
        description = dict(json.loads(path.read_text(encoding="utf-8")))
        kind = description.pop("kind")
    except (ValueError, KeyError, TypeError) as error:
        raise TokenizerError(f"{path} does not describe a tokenizer: {error}") from error
    if kind not in tuple(_KINDS):
        raise TokenizerError(
            f"{path} describes a {kind!r} tokenizer; this version reads "
            f"{' and '.join(map(repr, _KINDS))}"
        )
    vocabulary = _KINDS[kind].load(folder)
    config = _config_from(path, {**vocabulary.special_pieces, **description})
    fast = [] if kind == FastVocabulary.kind else [folder / name for name in _FAST_FILES]
    fast_files = {each.name: each.read_bytes() for each in fast if each.is_file()}
    return Tokenizer(vocabulary, config, fast_files=fast_files)


def _config_from(path: Path, description: Mapping[str, Any]) -> TokenizerConfig:
    known = {field.name for field in fields(TokenizerConfig)}
    unknown = sorted(description.keys() - known)
    if unknown:
        raise TokenizerError(
            f"{path} says {', '.join(unknown)}; expected only {', '.join(sorted(known))}"
        )
    try:
        return TokenizerConfig(**description)
    except TypeError as error:
        raise TokenizerError(f"{path} lacks a part: {error}") from error
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def pad(rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> TokenBatch:
    """Stack rows of ids into one batch as long as the longest row, or of the length asked for.

    Raises:
        TokenizerError: a row is longer than `length`.
    """
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    longest = int(lengths.max(initial=0))
    if length is not None and longest > length:
        raise TokenizerError(f"pad_to is {length}; expected at least {longest}, the longest text")
    mask = np.arange(longest if length is None else length) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(mask))
