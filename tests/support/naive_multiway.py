"""M2-Encoder's forward pass a second time: one input at a time, in loops, without padding."""

from math import sqrt

import torch

HEADS = ("itc_vl_{}_proj", "itc_{}_proj")


def _norm(x, weights, name, branch):
    weight, bias = weights[f"{name}.{branch}.weight"], weights[f"{name}.{branch}.bias"]
    return _plain_norm(x, weight, bias)


def _plain_norm(x, weight, bias):
    rows = []
    for row in x:
        centred = row - row.sum() / len(row)
        rows.append(centred / torch.sqrt((centred * centred).sum() / len(row) + 1e-5))
    return torch.stack(rows) * weight + bias


def _linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _layer(x, weights, layer, branch):
    normed = _norm(x, weights, f"{layer}.self_attn_layer_norm", branch)
    q, k, v = (
        _linear(normed, weights, f"{layer}.self_attn.{each}_proj.{branch}") for each in "qkv"
    )
    size = TINY.width // TINY.heads
    heads = []
    for start in range(0, TINY.width, size):
        part = slice(start, start + size)
        rows = []
        for query in q[:, part]:
            exponentials = torch.exp((k[:, part] @ query) / sqrt(size))
            rows.append((exponentials / exponentials.sum()) @ v[:, part])
        heads.append(torch.stack(rows))
    inner = _norm(torch.cat(heads, dim=1), weights, f"{layer}.self_attn.inner_attn_ln", branch)
    x = x + _linear(inner, weights, f"{layer}.self_attn.out_proj.{branch}")
    ffn = f"{layer}.ffn.{branch}"
    normed = _norm(x, weights, f"{layer}.final_layer_norm", branch)
    hidden = _linear(normed, weights, f"{ffn}.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / sqrt(2)))
    norm = f"{ffn}.ffn_layernorm"
    hidden = _plain_norm(hidden, weights[f"{norm}.weight"], weights[f"{norm}.bias"])
    return x + _linear(hidden, weights, f"{ffn}.fc2")


def _encoders(x, weights, branch, kind):
    """Return the features by head and the last states of one input."""
    for number in range(TINY.layers):
        x = _layer(x, weights, f"backbone.encoder.layers.{number}", branch)
    own = x = _norm(x, weights, "backbone.encoder.layer_norm", branch)
    for number in range(TINY.vl_layers):
        x = _layer(x, weights, f"backbone_vl.layers.{number}", "A")
    x = _norm(x, weights, "backbone_vl.layer_norm", "A")
    main, unimodal = (weights[f"{head.format(kind)}.fc.weight"] for head in HEADS)
    return main @ x[0], unimodal @ own[0], x


def naive_image(image, weights):
    proj = weights["backbone.vision_embed.proj.weight"]
    rows = [weights["backbone.vision_embed.cls_token"][0, 0]]
    side = TINY.patch_size
    for top in range(0, TINY.image_size, side):
        for left in range(0, TINY.image_size, side):
            patch = image[:, top : top + side, left : left + side]
            values = (proj * patch).sum(dim=(1, 2, 3))
            rows.append(values + weights["backbone.vision_embed.proj.bias"])
    table = weights["backbone.encoder.embed_positions.A.weight"]
    states = torch.stack([row + table[2 + number] for number, row in enumerate(rows)])
    main, unimodal, states = _encoders(states, weights, "A", "image")
    return main, unimodal, states[1:]


def naive_text(ids, weights):
    table = weights["backbone.encoder.embed_positions.B.weight"]
    rows = [
        weights["backbone.text_embed.weight"][token] + table[2 + number]
        for number, token in enumerate(ids.tolist())
    ]
    return _encoders(torch.stack(rows), weights, "B", "text")
