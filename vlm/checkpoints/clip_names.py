"""The names that transformers gives the tensors of CLIP and Chinese-CLIP, beside open_clip's."""

import re

from vlm.checkpoints.accounting import Origin

_TOWERS = {"visual": "vision_model", "text": "text_model"}
_LAYER = re.compile(r"(visual|text)\.transformer\.resblocks\.(\d+)\.(.+)")
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OUTSIDE = {
    "log_logit_scale": Origin(("logit_scale",)),
    "visual.proj": Origin(("visual_projection.weight",), transposed=True),
    "visual.class_embedding": Origin(("vision_model.embeddings.class_embedding",)),
    "visual.conv1.weight": Origin(("vision_model.embeddings.patch_embedding.weight",)),
    "visual.positional_embedding": Origin(("vision_model.embeddings.position_embedding.weight",)),
    "visual.ln_pre.weight": Origin(("vision_model.pre_layrnorm.weight",)),
    "visual.ln_pre.bias": Origin(("vision_model.pre_layrnorm.bias",)),
    "visual.ln_post.weight": Origin(("vision_model.post_layernorm.weight",)),
    "visual.ln_post.bias": Origin(("vision_model.post_layernorm.bias",)),
    "text.text_projection": Origin(("text_projection.weight",), transposed=True),
    "text.token_embedding.weight": Origin(("text_model.embeddings.token_embedding.weight",)),
    "text.positional_embedding": Origin(("text_model.embeddings.position_embedding.weight",)),
    "text.ln_final.weight": Origin(("text_model.final_layer_norm.weight",)),
    "text.ln_final.bias": Origin(("text_model.final_layer_norm.bias",)),
    "text.proj.weight": Origin(("text_projection.weight",)),  # Chinese-CLIP's is a module here too
}

ALLOWED = (r".*\.embeddings\.position_ids", r"text_model\.pooler\..*")
"""Lists of numbers that older files hold, and a pooler that Chinese-CLIP does not use."""


def origin_of(name: str) -> Origin:
    """Return where one of our tensors is in a folder of transformers."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if found := _LAYER.fullmatch(name):
        tower, layer, inner = found.groups()
        place = f"{_TOWERS[tower]}.encoder.layers.{layer}"
        if inner.startswith("attn.in_proj_"):
            kind = inner.removeprefix("attn.in_proj_")
            return Origin(tuple(f"{place}.self_attn.{one}_proj.{kind}" for one in "qkv"))
        module, _, kind = inner.rpartition(".")
        return Origin((f"{place}.{_IN_LAYER.get(module, module)}.{kind}",))
    return Origin((name.replace("text.transformer.", "text_model."),))
