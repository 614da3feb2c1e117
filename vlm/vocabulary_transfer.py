"""Bundles for a grown or a reduced vocabulary: what a model makes of its new ids."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from open_clip.transformer import TextTransformer
from torch import Tensor

from vlm.bundle import Bundle, save_bundle
from vlm.errors import ConfigError, TokenizerError
from vlm.models.config import GrowthConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.models.growth import (
    grow_positions,
    grow_text_tower,
    low_rank,
    mean_rows,
    random_rows,
    shrink_token_embedding,
    similar_rows,
)
from vlm.text.extension import is_extension
from vlm.text.lexicon import read_lexicon, read_vectors
from vlm.text.tokenizer import Tokenizer


class GrownRows(NamedTuple):
    """The rows of new pieces, and how they came about."""

    rows: Float[Tensor, "count width"]
    known: int
    """How many of them the lexicon or the vectors had; the others are means of sub-pieces."""


def grow_bundle(bundle: Bundle, tokenizer: Tokenizer, config: GrowthConfig, out: Path) -> GrownRows:
    """Write the bundle of a model that reads the ids of an extended tokenizer.

    What the old tokenizer says is read as before: its rows stay bit for bit, and with
    `how="append"` its positions too. The bundle's model is changed in place.
    """
    old = bundle.tokenizer
    if not is_extension(tokenizer, old) or tokenizer.vocab_size <= old.vocab_size:
        raise TokenizerError(
            f"the tokenizer's {tokenizer.vocab_size} ids do not go on from the {old.vocab_size} "
            "of the bundle; expected one that was extended from the bundle's"
        )
    length = config.positions or tokenizer.context_length
    tower = _text_tower(bundle)
    grown = new_rows(tower.token_embedding.weight.detach(), old, tokenizer, config)
    positions = grow_positions(
        tower.positional_embedding.detach(), length, config.how, seed=config.seed
    )
    grow_text_tower(tower, new_rows=grown.rows, positions=positions)
    tokenizer = Tokenizer(tokenizer.vocabulary, replace(tokenizer.config, context_length=length))
    _save(out, bundle, tokenizer, first_new_id=old.vocab_size)
    return grown


def new_rows(
    embedding: Float[Tensor, "vocabulary width"],
    old: Tokenizer,
    new: Tokenizer,
    config: GrowthConfig,
) -> GrownRows:
    """Return the rows of the pieces that `new` has and `old` has not."""
    pieces = new.vocabulary.pieces()[old.vocab_size :]
    if config.init == "random":
        return GrownRows(random_rows(embedding, len(pieces), seed=config.seed), known=0)
    split = old.split(pieces)
    if config.init == "lexicon":
        translated = _translations(pieces, old, config.lexicon)
        sources = [ids or own for ids, own in zip(translated, split, strict=True)]
        return GrownRows(rows=mean_rows(embedding, sources), known=sum(map(bool, translated)))
    rows = mean_rows(embedding, split)
    if config.init == "mean":
        return GrownRows(rows=rows, known=len(pieces))
    known, similar = _similar(embedding, old, pieces, config)
    rows[known] = similar
    return GrownRows(rows=rows, known=len(known))


def prune_bundle(bundle: Bundle, tokenizer: Tokenizer, kept: Sequence[int], out: Path) -> None:
    """Write the bundle of a model that reads only some of its ids.

    Args:
        bundle: The model to reduce; it is changed in place.
        tokenizer: The reduced tokenizer.
        kept: The old id of each of its ids, as `vlm.text.pruning.prune` returns them.
        out: The folder to write.
    """
    shrink_token_embedding(_text_tower(bundle), kept)
    _save(out, bundle, tokenizer, first_new_id=None)


def _text_tower(bundle: Bundle) -> TextTransformer:
    model = bundle.model
    if isinstance(model, DualEncoder) and isinstance(model.text, TextTransformer):
        return model.text
    raise ConfigError("unsupported text tower; expected one of open_clip's own")


def _translations(pieces: Sequence[str], old: Tokenizer, path: Path | None) -> list[list[int]]:
    """Return the ids of all translations of each piece; none where it has no translation."""
    lexicon = read_lexicon(path)
    translations = [lexicon.get(piece, []) for piece in pieces]
    split = iter(old.split(list(chain.from_iterable(translations))))
    return [list(chain.from_iterable(islice(split, len(of_one)))) for of_one in translations]


def _similar(
    embedding: Float[Tensor, "vocabulary width"],
    old: Tokenizer,
    pieces: Sequence[str],
    config: GrowthConfig,
) -> tuple[list[int], Float[Tensor, "known width"]]:
    """Return which new pieces have vectors, and the rows that they get by them."""
    if not config.vectors:
        raise ConfigError("similarity needs vectors; name files of word vectors with --vectors")
    surfaces = [old.vocabulary.decode([i]).strip() for i in range(old.vocab_size)]
    vectors = read_vectors(config.vectors, {*surfaces, *pieces})
    known = [i for i, piece in enumerate(pieces) if piece in vectors and vectors[piece].any()]
    if not known or not any(surface in vectors for surface in surfaces):
        raise TokenizerError(
            f"the vectors have {len(known)} of {len(pieces)} new pieces and "
            f"{sum(surface in vectors for surface in surfaces)} of the old; expected some of both"
        )
    nothing = np.zeros(len(next(iter(vectors.values()))), dtype=np.float32)
    of_old = np.stack([vectors.get(surface, nothing) for surface in surfaces])
    of_new = np.stack([vectors[pieces[i]] for i in known])
    rows = similar_rows(
        embedding if config.rank is None else low_rank(embedding, config.rank),
        torch.from_numpy(of_old),
        torch.from_numpy(of_new),
        neighbours=config.neighbours,
        temperature=config.temperature,
    )
    return known, rows


def _save(out: Path, bundle: Bundle, tokenizer: Tokenizer, *, first_new_id: int | None) -> None:
    """Write a bundle whose model has come to read another tokenizer's ids."""
    text_cfg = dict(bundle.model_cfg["text_cfg"]) | {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "pad_id": tokenizer.special_ids.padding,
        # The end of text is no longer the highest id.
        "pool_type": "eos",
        "eos_id": tokenizer.special_ids.end_of_text,
    }
    save_bundle(
        out,
        model=bundle.model,
        model_cfg=dict(bundle.model_cfg) | {"text_cfg": text_cfg},
        preprocess_cfg=bundle.preprocess_cfg,
        tokenizer=tokenizer,
        languages=bundle.languages,
        first_new_id=first_new_id,
        truncate_dims=bundle.truncate_dims,
    )
