"""The decoder over two sides by its definition, from its parameters alone."""

import math

import torch
import torch.nn.functional as F


def attention(module, queries, keys, mask):
    """Attend by the definition, sample by sample and head by head."""
    width, heads = module.embed_dim, module.num_heads
    weight, bias = module.in_proj_weight.split(width), module.in_proj_bias.split(width)
    rows = []
    for query, key, seen in zip(queries, keys, mask, strict=True):
        q, k, v = (
            F.linear(each, w, b).split(width // heads, dim=-1)
            for each, w, b in zip((query, key[seen], key[seen]), weight, bias, strict=True)
        )
        row = [
            (a @ b.T / math.sqrt(width // heads)).softmax(-1) @ c
            for a, b, c in zip(q, k, v, strict=True)
        ]
        rows.append(torch.cat(row, dim=-1))
    return F.linear(torch.stack(rows), module.out_proj.weight, module.out_proj.bias)


def decode(decoder, queries, keys, query_mask, key_mask):
    """Decode step by step, from the decoder's parameters alone."""
    x, other = decoder.query_in(queries), decoder.key_in(keys)
    for layer in decoder.layers:
        normed = layer.norm1(x)
        x = x + attention(layer.self_attn, normed, normed, query_mask)
        x = x + attention(layer.multihead_attn, layer.norm2(x), other, key_mask)
        hidden = F.linear(layer.norm3(x), layer.linear1.weight, layer.linear1.bias)
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + F.linear(hidden, layer.linear2.weight, layer.linear2.bias)
    return decoder.norm(x)
