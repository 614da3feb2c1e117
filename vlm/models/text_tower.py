"""open_clip's text transformer run on padded batches of any length."""

import torch
from jaxtyping import Float
from open_clip.transformer import TextTransformer
from torch import Tensor

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
    states = tower.token_embedding(tokens.ids) + tower.positional_embedding[:length]
    states = tower.transformer(states, attn_mask=tower.attn_mask[:length, :length])
    end_of_text = tokens.mask.sum(dim=1) - 1
    pooled = states[torch.arange(len(states), device=states.device), end_of_text]
    # Normalising after pooling gives the same and touches one position instead of all.
    features: Tensor = tower.ln_final(pooled) @ tower.text_projection
    return features
