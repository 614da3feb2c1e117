"""How a model takes in texts and images, as every evaluation records it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.embedding.embedder import Embedder


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a model takes in what it is asked."""

    model: str
    """Fingerprint of the bundle."""
    embed_dim: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    context_length: int
    """Longest text in tokens."""
    truncated_share: float
    """Ratio in [0, 1] of the texts that were truncated to it."""
    transform: Mapping[str, Any]
    """open_clip's description of the image transform."""
    logit_scale: float
    """Factor that turns cosines into the model's logits."""
    logit_bias: float
    """Added to the scaled cosines; 0 for a model without a bias."""


def reading_of(embedder: Embedder, texts: Sequence[str]) -> Reading:
    """Describe how a model takes in images, and these texts."""
    tokenizer = embedder.tokenizer
    bias = embedder.bundle.model.logit_bias
    around = 1 + (tokenizer.special_ids.begin_of_text is not None)  # begin and end of text
    room = tokenizer.context_length - around
    truncated = sum(len(row) > room for row in tokenizer.split(texts))
    return Reading(
        model=embedder.fingerprint,
        embed_dim=embedder.embed_dim,
        tokenizer=tokenizer.fingerprint,
        context_length=tokenizer.context_length,
        truncated_share=truncated / max(1, len(texts)),
        transform=dict(embedder.bundle.preprocess_cfg),
        logit_scale=float(embedder.bundle.model.log_logit_scale.detach().exp()),
        logit_bias=0.0 if bias is None else float(bias.detach()),
    )
