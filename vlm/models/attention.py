"""torch's attention module over one sequence, without the copies that it makes for training."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as torch's module does; what its callers here do not ask for is left to that."""
        if need_weights or key is not value or key_padding_mask is not None or is_causal:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        heads = (self.num_heads, self.head_dim)
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if query is key:
            packed = torch.unflatten(F.linear(query, weight, bias), -1, (3, *heads))
            # `unbind` puts gradients together by one copy; indexing would add zeros.
            queries, keys, values = packed.permute(2, 0, 3, 1, 4).unbind()
        else:
            own_bias, other_bias = torch.split(bias, [width, 2 * width])
            own_weight, other_weight = torch.split(weight, [width, 2 * width])
            queries = torch.unflatten(F.linear(query, own_weight, own_bias), -1, heads)
            queries = queries.transpose(1, 2)
            packed = torch.unflatten(F.linear(key, other_weight, other_bias), -1, (2, *heads))
            keys, values = packed.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(
            queries, keys, values, self._mask(attn_mask), self.dropout if self.training else 0.0
        )
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

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


def _is_plain(module: nn.MultiheadAttention) -> bool:
    packed = module._qkv_same_embed_dim and module.in_proj_bias is not None
    return module.batch_first and packed and module.bias_k is None and not module.add_zero_attn
