"""Text towers run on padded batches of any length: open_clip's, and bags of tokens."""

from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models import hugging_face_tower
from vlm.models.attention import Packing, attends_packed, run_at_one_position
from vlm.models.bag_of_tokens import BagOfTokens
from vlm.models.encoder import Replacement
from vlm.text.tokenizer import TokenBatch

TextTower: TypeAlias = TextTransformer | HFTextEncoder | BagOfTokens

_AT_END_OF_TEXT = ("eos", "argmax")


def check_text_tower(tower: TextTower) -> None:
    """Refuse a tower that `encode_tokens` would run wrongly."""
    if isinstance(tower, HFTextEncoder):
        hugging_face_tower.check(tower)
    elif isinstance(tower, TextTransformer) and tower.pool_type == "none" and tower.cls_emb is None:
        raise ConfigError(
            "the text tower pools by 'none', which leaves a vector a token; "
            "expected 'eos', 'argmax', 'last' or 'first'"
        )


def check_reads_to_end_of_text(tower: TextTower) -> None:
    """Refuse a tower whose features depend on more than a text's tokens in their order."""
    if not isinstance(tower, TextTransformer) or not _stops_at_end_of_text(tower):
        kind = tower.pool_type if isinstance(tower, TextTransformer) else type(tower).__name__
        raise ConfigError(
            f"the text tower pools by {kind!r}; "
            "expected a causal transformer pooled at the end of text"
        )


def encode_tokens(tower: TextTower, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
    """Return one feature a text, not normalised: that of open_clip on the full context.

    open_clip's own forward pass needs every batch padded to the full context, and finds the end
    of text by an id. This one takes batches padded to their longest text and pools where the
    mask ends. In a causal transformer nothing after a token changes it. One that sees its
    padding gets it back.
    """
    if isinstance(tower, BagOfTokens):
        pooled: Tensor = tower(tokens)
        return pooled
    if isinstance(tower, HFTextEncoder) or not _stops_at_end_of_text(tower):
        return token_states(tower, tokens)[0]
    *blocks, last = tower.transformer.resblocks  # the last runs for one position: see below
    packing = _packing(tower, tokens)
    if packing is None:
        length = tokens.ids.shape[1]
        mask = tower.attn_mask[:length, :length]
        states = tower.token_embedding(tokens.ids) + tower.positional_embedding[:length]
    else:
        mask = packing
        places = packing.rows % packing.length
        ids = tokens.ids.flatten()[packing.rows]
        states = tower.token_embedding(ids) + tower.positional_embedding.index_select(0, places)
    for block in blocks:
        states = block(states, attn_mask=mask)
    if packing is not None:
        states = packing.pad(states)
    if isinstance(last, ResidualAttentionBlock):
        at_end = partial(_at_end_of_text, tokens=tokens)
        pooled = run_at_one_position(last, states, at_end, unseen=~tokens.mask)
    else:  # open_clip's blocks with scaled or normalised attention
        pooled = _at_end_of_text(last(states, attn_mask=mask), tokens)
    return _projected(tower, tower.ln_final(pooled))


def token_states(
    tower: TextTower, tokens: TokenBatch, replaced: Replacement | None = None
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch length width"]]:
    """Return features as `encode_tokens` does, and the states of tokens after the last norm."""
    if isinstance(tower, BagOfTokens):
        raise ConfigError(
            "a text tower of 0 layers has no states of tokens in their order, which masked "
            "modelling reads; expected text_cfg.layers of at least 1"
        )
    if isinstance(tower, HFTextEncoder):
        return hugging_face_tower.run(tower, tokens, replaced)
    length = tokens.ids.shape[1]
    ids = _ids_that_count(tower, tokens)
    states = tower.token_embedding(ids)
    if replaced is not None:
        where = F.pad(replaced[0], (0, ids.shape[1] - length))
        states = torch.where(where[:, :, None], replaced[1].to(states.dtype), states)
    positions = tower.positional_embedding
    if tower.cls_emb is not None:  # CoCa's class token comes last, at the last position
        states = torch.cat([states, tower.cls_emb.expand(len(ids), 1, -1)], dim=1)
        positions = torch.cat([positions[: ids.shape[1]], positions[-1:]])
    states = states + positions[: states.shape[1]]
    mask = _attention_mask(tower, ids)
    for block in tower.transformer.resblocks:
        states = block(states, attn_mask=mask)
    states = tower.ln_final(states)
    if tower.cls_emb is not None or tower.pool_type == "last":
        pooled = states[:, -1]
    else:
        first = tower.pool_type == "first"
        pooled = states[:, 0] if first else _at_end_of_text(states, tokens)
    return _projected(tower, pooled), states[:, :length]


def token_embedding(tower: TextTower) -> nn.Embedding:
    """Return the rows of the vocabulary."""
    if isinstance(tower, HFTextEncoder):
        return hugging_face_tower.token_embedding(tower)
    embedding: nn.Embedding = tower.token_embedding
    return embedding


def feature_width(tower: TextTower) -> int:
    """Return the width of the features."""
    if isinstance(tower, TextTransformer) and tower.text_projection is None:
        return int(tower.width)
    return int(tower.output_dim)


def text_blocks(tower: TextTower) -> list[nn.Module]:
    """Return the layers that a tower repeats, but for the one that `encode_tokens` runs in part."""
    if isinstance(tower, BagOfTokens):
        return []
    if isinstance(tower, HFTextEncoder):
        return hugging_face_tower.blocks(tower)
    blocks = list(tower.transformer.resblocks)
    in_part = _stops_at_end_of_text(tower) and isinstance(blocks[-1], ResidualAttentionBlock)
    return blocks[:-1] if in_part else blocks


def text_groups(tower: TextTower) -> list[list[nn.Parameter]]:
    """Return the parameters: embeddings, blocks, the last with its norm, and the projection."""
    if isinstance(tower, BagOfTokens):
        return [list(part.parameters()) for part in (tower.token_embedding, tower.text_projection)]
    if isinstance(tower, HFTextEncoder):
        return hugging_face_tower.groups(tower)
    embeddings = [*tower.token_embedding.parameters(), tower.positional_embedding]
    if tower.cls_emb is not None:
        embeddings.append(tower.cls_emb)
    blocks = [list(block.parameters()) for block in tower.transformer.resblocks]
    blocks[-1] += tower.ln_final.parameters()
    projection = tower.text_projection
    if projection is None:
        return [embeddings, *blocks]
    single = isinstance(projection, nn.Parameter)
    return [embeddings, *blocks, [projection] if single else list(projection.parameters())]


def _packing(tower: TextTransformer, tokens: TokenBatch) -> Packing | None:
    """Return where tokens are, if there is padding to leave out and the blocks are able to."""
    *blocks, last = tower.transformer.resblocks
    able = isinstance(last, ResidualAttentionBlock) and all(map(attends_packed, blocks))
    if not able or not blocks or tokens.count in (None, tokens.mask.numel()):
        return None
    # Its size is known, so that no device is waited for.
    rows = torch.nonzero_static(tokens.mask.flatten(), size=tokens.count)[:, 0]
    return Packing(rows, *tokens.mask.shape)


def _stops_at_end_of_text(tower: TextTransformer) -> bool:
    pools_at_end = tower.pool_type in _AT_END_OF_TEXT and tower.cls_emb is None
    return tower.attn_mask is not None and pools_at_end


def _ids_that_count(tower: TextTransformer, tokens: TokenBatch) -> Int64[Tensor, "batch seen"]:
    """Return the ids of all positions that features depend on, with the tower's own padding."""
    ids = tokens.ids.masked_fill(~tokens.mask, tower.pad_id)
    length = ids.shape[1]
    if tower.cls_emb is not None:
        # By open_clip's mask the class token sees the first padding after a text too.
        needed = min(length + 1, tower.context_length)
    elif tower.pool_type == "last" or (tower.attn_mask is None and not tower.use_pad_mask):
        needed = tower.context_length
    else:
        needed = length
    return F.pad(ids, (0, max(0, needed - length)), value=tower.pad_id)


def _attention_mask(tower: TextTransformer, ids: Int64[Tensor, "batch seen"]) -> Tensor | None:
    """Return what is added to attention logits, as open_clip masks the same ids.

    With a class token the mask of the keys is shifted by one, as open_clip's is and CoCa's
    published weights need it, unless the tower has `correct_cls_mask`.
    """
    length = ids.shape[1] + (tower.cls_emb is not None)
    causal: Tensor | None = tower.attn_mask
    causal = None if causal is None else causal[:length, :length]
    if tower.cls_emb is None and not tower.use_pad_mask:
        return causal
    seen = ids != tower.pad_id
    if tower.cls_emb is not None:
        always = seen.new_ones(len(seen), 1)
        seen = torch.cat([seen, always] if tower.correct_cls_mask else [always, seen], dim=1)
    keys = torch.zeros(seen.shape, dtype=tower.positional_embedding.dtype, device=seen.device)
    keys = keys.masked_fill(~seen, float("-inf"))[:, None].expand(-1, length, -1)
    mask = keys if causal is None else keys + causal
    # nn.MultiheadAttention takes a mask per text and head, heads innermost.
    return mask.repeat_interleave(tower.heads, dim=0)


def _projected(
    tower: TextTransformer, pooled: Float[Tensor, "batch width"]
) -> Float[Tensor, "batch dim"]:
    projection = tower.text_projection
    if projection is None:
        return pooled
    linear = isinstance(projection, nn.Linear)
    features: Tensor = projection(pooled) if linear else pooled @ projection
    return features


def _at_end_of_text(
    states: Float[Tensor, "batch length width"], tokens: TokenBatch
) -> Float[Tensor, "batch width"]:
    end_of_text = tokens.mask.sum(dim=1) - 1  # padding is on the right
    return states[torch.arange(len(states), device=states.device), end_of_text]
