"""`Recipe`: what reading a source finds out, and `ConversionConfig`: what its user has to say."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlm.checkpoints.accounting import OriginOf
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.reading import Tensors
from vlm.errors import CheckpointError
from vlm.text.importing import import_tokenizer
from vlm.text.tokenizer import Tokenizer
from vlm.text.words import HAN


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A source that has been understood: all that a bundle needs."""

    kind: str
    """What the source is, for people."""
    tensors: Tensors
    """The source's tensors by its own names."""
    origin_of: OriginOf
    """Which of them makes which of ours."""
    allowed: tuple[str, ...]
    """Patterns of names that are dropped on purpose."""
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    tokenizer: Tokenizer
    languages: tuple[str, ...]


def languages_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return Chinese and English where CLIP's vocabulary has Chinese pieces, else English."""
    has_chinese = any(map(HAN.match, tokenizer.vocabulary.pieces()))
    return ("zh", "en") if has_chinese else ("en",)


def read_tokenizer(
    config: ConversionConfig,
    own: str,
    *,
    rows: int,
    positions: int,
    context_length: int,
) -> Tokenizer:
    """Read the tokenizer that `config` names, or else the source's `own`, for a model of its sizes.

    `context_length` is the longest text in tokens by the source's own tokenizer.
    """
    tokenizer = import_tokenizer(config.tokenizer or own)
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {rows} rows; expected "
            "the tokenizer that the model was trained with"
        )
    if config.context_length is not None and config.context_length > positions:
        raise CheckpointError(
            f"the context length is {config.context_length}; the model has {positions} positions"
        )
    declared = tokenizer.context_length if config.tokenizer else context_length
    wanted = config.context_length
    length = min(declared, positions) if wanted is None else wanted
    return Tokenizer(tokenizer.vocabulary, replace(tokenizer.config, context_length=length))
