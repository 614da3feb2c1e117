"""M2-Encoder's forward pass a second time: one input at a time, in loops, without padding."""

from math import sqrt

import torch


class NaiveMultiway:
    """Reads images and texts with weights that have the names of M2-Encoder's checkpoints."""

    def __init__(self, config, weights):
        self.config = config
        self.weights = weights

    def image(self, image):
        """Return the main feature, the uni-modal one, and the states of the patches."""
        rows = [self.weights["backbone.vision_embed.cls_token"][0, 0]]
        size, side = self.config.image_size, self.config.patch_size
        for top in range(0, size, side):
            for left in range(0, size, side):
                patch = image[:, top : top + side, left : left + side]
                values = (self.weights["backbone.vision_embed.proj.weight"] * patch).sum((1, 2, 3))
                rows.append(values + self.weights["backbone.vision_embed.proj.bias"])
        main, unimodal, states = self._encode(rows, "A", "image")
        return main, unimodal, states[1:]

    def text(self, ids):
        """Return the main feature, the uni-modal one, and the states of the tokens."""
        table = self.weights["backbone.text_embed.weight"]
        return self._encode([table[token] for token in ids.tolist()], "B", "text")

    def _encode(self, rows, branch, kind):
        positions = self.weights[f"backbone.encoder.embed_positions.{branch}.weight"]
        x = torch.stack([row + positions[2 + number] for number, row in enumerate(rows)])
        for number in range(self.config.layers):
            x = self._layer(x, f"backbone.encoder.layers.{number}", branch)
        own = x = self._norm(x, f"backbone.encoder.layer_norm.{branch}")
        for number in range(self.config.vl_layers):
            x = self._layer(x, f"backbone_vl.layers.{number}", "A")
        x = self._norm(x, "backbone_vl.layer_norm.A")
        main = self.weights[f"itc_vl_{kind}_proj.fc.weight"] @ x[0]
        unimodal = self.weights[f"itc_{kind}_proj.fc.weight"] @ own[0]
        return main, unimodal, x

    def _layer(self, x, layer, branch):
        attn, ffn = f"{layer}.self_attn", f"{layer}.ffn.{branch}"
        normed = self._norm(x, f"{layer}.self_attn_layer_norm.{branch}")
        q, k, v = (self._linear(normed, f"{attn}.{each}_proj.{branch}") for each in "qkv")
        inner = self._norm(self._attention(q, k, v), f"{attn}.inner_attn_ln.{branch}")
        x = x + self._linear(inner, f"{attn}.out_proj.{branch}")
        normed = self._norm(x, f"{layer}.final_layer_norm.{branch}")
        hidden = self._linear(normed, f"{ffn}.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / sqrt(2)))
        return x + self._linear(self._norm(hidden, f"{ffn}.ffn_layernorm"), f"{ffn}.fc2")

    def _attention(self, q, k, v):
        width, size = self.config.width, self.config.width // self.config.heads
        heads = []
        for start in range(0, width, size):
            part = slice(start, start + size)
            rows = []
            for query in q[:, part]:
                exponentials = torch.exp((k[:, part] @ query) / sqrt(size))
                rows.append((exponentials / exponentials.sum()) @ v[:, part])
            heads.append(torch.stack(rows))
        return torch.cat(heads, dim=1)

    def _norm(self, x, name):
        rows = []
        for row in x:
            centred = row - row.sum() / len(row)
            rows.append(centred / torch.sqrt((centred * centred).sum() / len(row) + 1e-5))
        return torch.stack(rows) * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
