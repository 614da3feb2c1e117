"""Transformer layers with a set of weights for each kind of input (MAGNETO, BEiT-3).

Names of submodules are those of M2-Encoder's checkpoints.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers.drop import DropPath
from torch import Tensor, nn

from vlm.models.multiway_config import POSITION_OFFSET, MultiwayConfig

EMBEDDING_STD = 0.02
"""Spread of embeddings at the start, as in BEiT (Bao et al. 2022)."""


class MultiwayStack(nn.Module):
    """Layers and a last normalisation; an input goes through the branch that is named with it.

    There are as many layers as `drop_paths`, their stochastic depths in [0, 1). `positions` has the
    rows of each branch's position table, if it has one.
    """

    def __init__(
        self,
        config: MultiwayConfig,
        branches: Sequence[str],
        *,
        drop_paths: Sequence[float],
        positions: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MultiwayLayer(config, branches, rate) for rate in drop_paths)
        self.layer_norm = _for_each(branches, lambda: nn.LayerNorm(config.width))
        self.embed_positions = nn.ModuleDict(
            {branch: embedding(rows, config.width) for branch, rows in positions.items()}
        )
        _initialise(self.layers)

    def forward(
        self,
        states: Float[Tensor, "batch length width"],
        branch: str,
        *,
        mask: Bool[Tensor, "batch length"] | None,
        first_only: bool,
    ) -> Float[Tensor, "batch positions width"]:
        """Return the normalised last states.

        The mask is False at padding, which no token attends to. `first_only` gives the state of the
        first position alone, a length of 1, which makes the last layer cost a fraction.
        """
        key_mask = None if mask is None else mask[:, None, None]  # over heads and queries
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            # Every earlier layer needs all positions: they are the last one's keys.
            states = layer(states, branch, key_mask, first_only and number == last)
        normed: Tensor = self.layer_norm[branch](states)
        return normed

    def add_positions(
        self, states: Float[Tensor, "batch length width"], branch: str
    ) -> Float[Tensor, "batch length width"]:
        """Add the vectors of positions 0 to length - 1."""
        # fairseq's rows 0 and 1 stand for no position and are never read.
        numbers = torch.arange(states.shape[1], device=states.device) + POSITION_OFFSET
        positions: Tensor = self.embed_positions[branch](numbers)
        return states + positions

    def layer_parameters(self, branch: str) -> list[list[nn.Parameter]]:
        """Return a branch's parameters layer by layer, without the last normalisation."""
        return [
            # A branch is a key of each ModuleDict, so it stands between dots: `ffn.A.fc1`.
            [each for name, each in layer.named_parameters() if f".{branch}." in name]
            for layer in self.layers
        ]


class MultiwayLayer(nn.Module):
    """Attention and a feed-forward network, each with a normalisation before and one inside.

    The order is MAGNETO's Sub-LayerNorm (Wang et al. 2022, section 2.1).
    """

    def __init__(self, config: MultiwayConfig, branches: Sequence[str], drop_path: float) -> None:
        super().__init__()
        self.self_attn = MultiwayAttention(config, branches)
        self.self_attn_layer_norm = _for_each(branches, lambda: nn.LayerNorm(config.width))
        self.ffn = _for_each(branches, lambda: FeedForward(config))
        self.final_layer_norm = _for_each(branches, lambda: nn.LayerNorm(config.width))
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        states: Float[Tensor, "batch length width"],
        branch: str,
        key_mask: Bool[Tensor, "batch 1 1 length"] | None,
        first_only: bool,
    ) -> Float[Tensor, "batch positions width"]:
        """Return the next states, of the first position alone where only that is read."""
        normed = self.self_attn_layer_norm[branch](states)
        queries = normed
        if first_only:  # one query, but the keys and values of all positions
            states, queries = states[:, :1], normed[:, :1]
        states = states + self.drop_path(self.self_attn(queries, normed, branch, key_mask))
        inner = self.ffn[branch](self.final_layer_norm[branch](states))
        output: Tensor = states + self.drop_path(inner)
        return output


class MultiwayAttention(nn.Module):
    """Multi-head attention with a normalisation before the output projection."""

    def __init__(self, config: MultiwayConfig, branches: Sequence[str]) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.q_proj = _for_each(branches, lambda: nn.Linear(width, width))
        self.k_proj = _for_each(branches, lambda: nn.Linear(width, width))
        self.v_proj = _for_each(branches, lambda: nn.Linear(width, width))
        self.inner_attn_ln = _for_each(branches, lambda: nn.LayerNorm(width))
        self.out_proj = _for_each(branches, lambda: nn.Linear(width, width))

    def forward(
        self,
        queries: Float[Tensor, "batch positions width"],
        keys: Float[Tensor, "batch length width"],
        branch: str,
        key_mask: Bool[Tensor, "batch 1 1 length"] | None,
    ) -> Float[Tensor, "batch positions width"]:
        """Return what each query reads of the keys."""
        attended = F.scaled_dot_product_attention(
            self._split(self.q_proj[branch](queries)),
            self._split(self.k_proj[branch](keys)),
            self._split(self.v_proj[branch](keys)),
            attn_mask=key_mask,
        )
        joined = attended.transpose(1, 2).flatten(start_dim=2)
        output: Tensor = self.out_proj[branch](self.inner_attn_ln[branch](joined))
        return output

    def _split(
        self, states: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch heads length head_width"]:
        batch, length, _ = states.shape
        return states.view(batch, length, self.heads, -1).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear maps with a GELU and a normalisation between them."""

    def __init__(self, config: MultiwayConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.ffn_layernorm = nn.LayerNorm(config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)

    def forward(
        self, states: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        """Return what is added to each state."""
        output: Tensor = self.fc2(self.ffn_layernorm(F.gelu(self.fc1(states))))
        return output


def embedding(rows: int, width: int) -> nn.Embedding:
    """Return a table of vectors to be learned."""
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=EMBEDDING_STD)
    return table


def _for_each(branches: Sequence[str], make: Callable[[], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({branch: make() for branch in branches})


def _initialise(layers: nn.ModuleList) -> None:
    """Draw the weights as MAGNETO does in an encoder (Wang et al. 2022, section 2.2).

    Xavier's normal distribution with a gain of `sqrt(log(2 N))`, N the layers, and of 1 for
    queries and keys.
    """
    gain = math.sqrt(math.log(2 * len(layers)))
    for name, parameter in layers.named_parameters():
        if parameter.ndim == 2:
            # Queries and keys only weigh values: their scale does not add up over layers.
            plain = "q_proj" in name or "k_proj" in name
            nn.init.xavier_normal_(parameter, gain=1.0 if plain else gain)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
