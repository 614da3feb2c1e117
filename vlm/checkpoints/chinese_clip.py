"""Chinese-CLIP's own checkpoints (Yang et al. 2022), whose names are those of `cn_clip`."""

from collections.abc import Mapping
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from vlm.checkpoints.accounting import Origin
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.reading import Tensors, count_layers
from vlm.checkpoints.recipe import Recipe, read_tokenizer
from vlm.errors import CheckpointError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg

CONTEXT_LENGTH = 52
"""Tokens of the longest caption that the published models were trained on."""
ALLOWED = (r"bert\.pooler\..*", r"bert\.embeddings\.position_ids")
"""The pooler, which Chinese-CLIP does not use, and a list of numbers."""

_PUBLISHED = {  # of the text tower, whose configuration open_clip can look up there
    (768, 12): "hfl/chinese-roberta-wwm-ext",
    (1024, 24): "hfl/chinese-roberta-wwm-ext-large",
    (768, 3): "hfl/rbt3",
}
_HEAD_WIDTH = {1280: 80}  # CLIP's ViT-H; 64 in every other
_STAGES = 4
_REDUCTION = 32  # pixels a side for one position of the last feature map
_ROWS = "bert.embeddings.word_embeddings.weight"
_OURS_AND_THEIRS = {
    "log_logit_scale": Origin(("logit_scale",)),
    "text.proj.weight": Origin(("text_projection",), transposed=True),
}


def is_chinese_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors have the names of Chinese-CLIP."""
    return _ROWS in tensors and "text_projection" in tensors and "visual.conv1.weight" in tensors


def origin_of(name: str) -> Origin:
    """Return where one of our tensors is in Chinese-CLIP's files."""
    if name in _OURS_AND_THEIRS:
        return _OURS_AND_THEIRS[name]
    inner = name.removeprefix("text.transformer.")
    return Origin((name if inner == name else f"bert.{inner}",))


def read_chinese_clip(tensors: Tensors, config: ConversionConfig) -> Recipe:
    """Understand a Chinese-CLIP checkpoint, of the five published sizes or any other."""
    model_cfg = chinese_clip_model_cfg(tensors)
    bert = model_cfg["text_cfg"]["hf_config"]
    tokenizer = read_tokenizer(
        config,
        config.tokenizer or _published_vocabulary(),
        rows=bert["vocab_size"],
        positions=bert["max_position_embeddings"],
        context_length=CONTEXT_LENGTH,
    )
    # `cn_clip` squashes images, and normalises as CLIP does.
    preprocess = config.preprocess or PreprocessConfig(resize_mode="squash")
    return Recipe(
        kind="a Chinese-CLIP checkpoint",
        tensors=tensors,
        origin_of=origin_of,
        allowed=ALLOWED,
        model_cfg=model_cfg,
        preprocess_cfg=preprocess_cfg(preprocess, model_cfg["vision_cfg"]["image_size"]),
        tokenizer=tokenizer,
        languages=config.languages or ("zh",),
    )


def chinese_clip_model_cfg(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return open_clip's description of the model that has these tensors."""
    try:
        vocabulary, width = tensors[_ROWS].shape
        bert = {
            "model_type": "bert",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": count_layers(tensors, r"bert\.encoder\.layer\.(\d+)\."),
            "num_attention_heads": width // 64,
            "intermediate_size": len(tensors["bert.encoder.layer.0.intermediate.dense.bias"]),
            "max_position_embeddings": len(tensors["bert.embeddings.position_embeddings.weight"]),
            "type_vocab_size": len(tensors["bert.embeddings.token_type_embeddings.weight"]),
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
        }
        embed_dim = tensors["text_projection"].shape[1]
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"the text tower's size is unknown: {error} is missing") from error
    return {
        "embed_dim": embed_dim,
        "vision_cfg": image_tower_cfg(tensors),
        "text_cfg": text_cfg(bert),
        "custom_text": True,
        "quick_gelu": True,
    }


def image_tower_cfg(tensors: Mapping[str, Tensor], prefix: str = "visual.") -> dict[str, Any]:
    """Return open_clip's `vision_cfg` of a vision transformer or a residual network of CLIP.

    Their names are those of OpenAI's release, which open_clip and Chinese-CLIP keep.
    """
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    try:
        if "layer1.0.conv1.weight" in own:
            positions = len(own["attnpool.positional_embedding"]) - 1
            stages = range(1, _STAGES + 1)
            return {
                "image_size": _REDUCTION * isqrt(positions),
                "width": len(own["layer1.0.conv1.weight"]),
                "layers": [count_layers(own, rf"layer{stage}\.(\d+)\.") for stage in stages],
            }
        width, _, patch, _ = own["conv1.weight"].shape
        return {
            "image_size": patch * isqrt(len(own["positional_embedding"]) - 1),
            "patch_size": patch,
            "width": width,
            "layers": count_layers(own, r"transformer\.resblocks\.(\d+)\."),
            "head_width": _HEAD_WIDTH.get(width, 64),
            "mlp_ratio": len(own["transformer.resblocks.0.mlp.c_fc.bias"]) / width,
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"the image tower's size is unknown: {error} is missing") from error


def text_cfg(bert: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's `text_cfg` of a BERT that is read at its first token."""
    sizes = (bert["hidden_size"], bert["num_hidden_layers"])
    return {
        "hf_model_name": _PUBLISHED.get(sizes, "bert"),
        "hf_model_pretrained": False,
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "hf_proj_type": "linear",
        "context_length": CONTEXT_LENGTH,
        "hf_config": dict(bert),
    }


def _published_vocabulary() -> str:
    """Return the file of BERT's pieces that the package `cn_clip` has; none of it is run."""
    package = find_spec("cn_clip")
    if package is None or not package.submodule_search_locations:
        raise CheckpointError(
            "a Chinese-CLIP checkpoint holds no tokenizer; name BERT's vocab.txt with --tokenizer, "
            "or install the package cn_clip, which has it"
        )
    return str(Path(package.submodule_search_locations[0]) / "clip" / "vocab.txt")
