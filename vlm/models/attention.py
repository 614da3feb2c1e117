"""Attention over one sequence without torch's copies, without padding, or at one position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of padded texts are. All but attention runs on these alone.

    Takes the place of an attention mask: a token sees those before it in its text.
    """

    rows: Int64[Tensor, " tokens"]
    """The position of each token among those of all texts, text by text."""
    texts: int
    length: int

    # Shapes are in docstrings where torch compiles: it would compile their checks too.

    def pack(self, padded: Tensor) -> Tensor:
        """Return (tokens, width) of (texts, length, width), without the padding."""
        return padded.flatten(0, 1).index_select(0, self.rows)

    def pad(self, packed: Tensor) -> Tensor:
        """Return (texts, length, width) of (tokens, width), with zeros where the padding was."""
        zeros = packed.new_zeros(self.texts * self.length, packed.shape[1])
        # Nothing is added to: of torch's ways to place rows it is the fastest on a CPU.
        rows = zeros.index_add(0, self.rows, packed)
        return rows.view(self.texts, self.length, -1)

    def to(self, dtype: torch.dtype) -> "Packing":
        """Return this: blocks of open_clip convert a mask before they hand it on to attention."""
        return self


def run_at_one_position(
    block: ResidualAttentionBlock,
    states: Float[Tensor, "batch length width"],
    position: Callable[[Tensor], Tensor],
    unseen: Bool[Tensor, "batch length"] | None = None,
) -> Float[Tensor, "batch width"]:
    """Run a tower's last block for the one position that is read: a sixth of its arithmetic.

    Args:
        block: A block of open_clip.
        states: Of all positions; what is not read needs a key and a value alone.
        position: Takes what belongs to the position from states.
        unseen: True where the position does not look; None where it sees all.
    """
    normed = block.ln_1(states)
    # Per sample and head, heads innermost. As `key_padding_mask`, torch would check it by means of
    # sympy, whose import takes a second of a first search.
    mask = None if unseen is None else unseen[:, None].repeat_interleave(block.attn.num_heads, 0)
    attended, _ = block.attn(
        position(normed)[:, None], normed, normed, attn_mask=mask, need_weights=False
    )
    pooled: Tensor = position(states) + block.ls_1(attended[:, 0])
    output: Tensor = pooled + block.ls_2(block.mlp(block.ln_2(pooled)))
    return output


class PackedAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with samples outermost and the three projections packed.

    torch's own lays tokens outermost, splits the projections by copies, and puts their gradients
    together by adding three tensors that are zero but for a third: half a text tower's copies.
    Values are the same up to rounding, parameters and their names are the same.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | Packing | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as torch's module does; what its callers here do not ask for is left to that."""
        if isinstance(attn_mask, Packing):
            return self._without_padding(query, attn_mask), None
        if need_weights or key is not value or key_padding_mask is not None or is_causal:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        heads = (self.num_heads, self.head_dim)
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query is key:
            # `unbind` puts gradients together by one copy; indexing would add zeros.
            queries, keys, values = self._divided(F.linear(query, weight, bias)).unbind()
        else:
            own_bias, other_bias = torch.split(bias, [width, 2 * width])
            own_weight, other_weight = torch.split(weight, [width, 2 * width])
            queries = torch.unflatten(F.linear(query, own_weight, own_bias), -1, heads)
            queries = queries.transpose(1, 2)
            keys, values = self._divided(F.linear(key, other_weight, other_bias)).unbind()
        attended = F.scaled_dot_product_attention(
            queries, keys, values, self._mask(attn_mask), self.dropout if self.training else 0.0
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

    def _without_padding(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Attend from and to (tokens, width)."""
        projected = F.linear(tokens, self.in_proj_weight, self.in_proj_bias)
        queries, keys, values = self._divided(packing.pad(projected)).unbind()
        # Padding comes after a text's tokens, so they do not see it.
        attended = F.scaled_dot_product_attention(
            queries, keys, values, None, self.dropout if self.training else 0.0, is_causal=True
        )
        output: Tensor = self.out_proj(packing.pack(attended.transpose(1, 2).flatten(2)))
        return output

    def _divided(self, projected: Tensor) -> Tensor:
        """Return (parts, batch, heads, length, head width) of projections along the last axis."""
        packed = torch.unflatten(projected, -1, (-1, self.num_heads, self.head_dim))
        return packed.permute(2, 0, 3, 1, 4)

    def _mask(self, mask: Tensor | None) -> Tensor | None:
        """Return a mask, true where nothing is seen, as the other function takes it."""
        if mask is None:
            return None
        if mask.ndim == 3:  # a mask a text and head, heads innermost
            mask = torch.unflatten(mask, 0, (-1, self.num_heads))
        return ~mask if mask.dtype == torch.bool else mask


def pack_attention(model: nn.Module) -> None:
    """Let a model's attention over one sequence run packed, in place: other modules stay."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention and _is_plain(module):
            # Its class alone differs, so that whoever knows torch's module knows this one.
            module.__class__ = PackedAttention


def attends_packed(block: nn.Module) -> bool:
    """Say whether a block of open_clip takes a `Packing`."""
    return isinstance(getattr(block, "attn", None), PackedAttention)


def _is_plain(module: nn.MultiheadAttention) -> bool:
    packed = module._qkv_same_embed_dim and module.in_proj_bias is not None
    return module.batch_first and packed and module.bias_k is None and not module.add_zero_attn
