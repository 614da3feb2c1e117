"""A decoder whose states look at each other and at those of another side."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.errors import ConfigError

_HEAD_WIDTH = 64


class CrossDecoder(nn.Module):
    """Layers of attention to oneself, attention to the other side, and a feed-forward network.

    Layers are normalised at their beginning. Where the states stand is for them to say: the
    decoder has no positions of its own.

    Args:
        query_width: Width of the states that are decoded.
        key_width: Width of those they look at.
        width: Width of the decoder; None for `query_width`.
        heads: Attention heads; None for one for every 64 of the width.
        layers: Number of layers.

    Raises:
        ConfigError: the heads do not divide the width.
    """

    def __init__(
        self,
        query_width: int,
        key_width: int,
        *,
        width: int | None = None,
        heads: int | None = None,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.width = width = width or query_width
        heads = heads or (1 if width % _HEAD_WIDTH else width // _HEAD_WIDTH)
        if width % heads:
            raise ConfigError(f"decoder_heads is {heads}; expected a divisor of the width {width}")
        self.query_in = nn.Sequential(nn.LayerNorm(query_width), nn.Linear(query_width, width))
        self.key_in = nn.Sequential(nn.LayerNorm(key_width), nn.Linear(key_width, width))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        queries: Float[Tensor, "batch queries query_width"],
        keys: Float[Tensor, "batch keys key_width"],
        *,
        query_mask: Bool[Tensor, "batch queries"] | None = None,
        key_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch queries width"]:
        """Return decoded states; those at padding mean nothing.

        Args:
            queries: States to decode.
            keys: States of the other side.
            query_mask: False at padding of the first; None where there is none.
            key_mask: False at padding of the second; what has nothing else looks at zeros.
        """
        states, seen = self.query_in(queries), self.key_in(keys)
        if key_mask is not None:
            seen = seen * key_mask.any(dim=1)[:, None, None]
        for layer in self.layers:
            states = layer(
                states,
                seen,
                tgt_key_padding_mask=_padding(query_mask),
                memory_key_padding_mask=_padding(key_mask),
            )
        decoded: Tensor = self.norm(states)
        return decoded


def _padding(mask: Tensor | None) -> Tensor | None:
    """Return where attention must not look; everywhere it may, where it could look nowhere."""
    return None if mask is None else ~mask & mask.any(dim=1, keepdim=True)
