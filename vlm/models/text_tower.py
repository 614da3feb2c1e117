"""open_clip's text transformer run on padded batches of any length."""

import torch
from jaxtyping import Float
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.errors import ConfigError
from vlm.text.tokenizer import TokenBatch


def check_text_tower(tower: TextTransformer) -> None:
    """Refuse a tower that `encode_tokens` would run wrongly.

    Raises:
        ConfigError: the transformer is not causal or does not pool at the end of text.
    """
    pools_at_end = tower.pool_type in ("eos", "argmax") and tower.cls_emb is None
    if tower.attn_mask is None or not pools_at_end:
        raise ConfigError(
            f"the text tower pools by {tower.pool_type!r}; "
            "expected a causal transformer pooled at the end of text"
        )


def encode_tokens(tower: TextTransformer, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
    """Return one feature a text, not normalised.

    open_clip's own forward pass needs every batch padded to the full context, and finds the end
    of text by an id. This one takes batches padded to their longest text and pools where the
    mask ends. The features are the same: in a causal transformer nothing after a token changes it.
    """
    length = tokens.ids.shape[1]
    causal_mask = tower.attn_mask[:length, :length]
    states = tower.token_embedding(tokens.ids) + tower.positional_embedding[:length]
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        states = _run_block(tower, block, states, causal_mask)
    if isinstance(last, ResidualAttentionBlock):
        pooled = _last_block_at_end_of_text(last, states, tokens)
    else:  # open_clip's blocks with scaled or normalised attention
        pooled = _at_end_of_text(_run_block(tower, last, states, causal_mask), tokens)
    features: Tensor = tower.ln_final(pooled) @ tower.text_projection
    return features


def _run_block(
    tower: TextTransformer, block: nn.Module, states: Tensor, causal_mask: Tensor
) -> Tensor:
    if tower.transformer.grad_checkpointing and torch.is_grad_enabled():
        output: Tensor = checkpoint(block, states, attn_mask=causal_mask, use_reentrant=False)
    else:
        output = block(states, attn_mask=causal_mask)
    return output


def _last_block_at_end_of_text(
    block: ResidualAttentionBlock, states: Float[Tensor, "batch length width"], tokens: TokenBatch
) -> Float[Tensor, "batch width"]:
    """Run the last block for the one position that is read: a fraction of its arithmetic."""
    normed = block.ln_1(states)
    query = _at_end_of_text(normed, tokens)[:, None]
    attended, _ = block.attn(
        query, normed, normed, key_padding_mask=~tokens.mask, need_weights=False
    )
    pooled: Tensor = _at_end_of_text(states, tokens) + block.ls_1(attended[:, 0])
    output: Tensor = pooled + block.ls_2(block.mlp(block.ln_2(pooled)))
    return output


def _at_end_of_text(
    states: Float[Tensor, "batch length width"], tokens: TokenBatch
) -> Float[Tensor, "batch width"]:
    end_of_text = tokens.mask.sum(dim=1) - 1
    return states[torch.arange(len(states), device=states.device), end_of_text]
