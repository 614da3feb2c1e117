"""Folders of transformers' `CLIPModel` and `ChineseCLIPModel`, as `save_pretrained` writes them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.checkpoints import chinese_clip
from vlm.checkpoints.accounting import Origin
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.reading import find_weights, read_json, read_tensors
from vlm.checkpoints.recipe import Recipe, languages_of, read_tokenizer
from vlm.errors import CheckpointError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.text.tokenizer import Tokenizer

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
CLIP, CHINESE_CLIP = "clip", "chinese_clip"
RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers, which the files have."""

_EPS = 1e-5  # torch's own
_ARGMAX = 2  # `eos_token_id` of configurations from before pooling went by it

# What `config.json` leaves out where it is the default.
_VISION: Mapping[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
    "hidden_act": "quick_gelu", "layer_norm_eps": _EPS,
}  # fmt: skip
_TEXT: Mapping[str, Mapping[str, Any]] = {
    CLIP: {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
        "num_attention_heads": 8, "max_position_embeddings": 77, "vocab_size": 49408,
        "hidden_act": "quick_gelu", "layer_norm_eps": _EPS, "eos_token_id": 49407,
    },
    CHINESE_CLIP: {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 512, "vocab_size": 30522,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0,
    },
}  # fmt: skip

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

_ALLOWED = (r".*\.embeddings\.position_ids", r"text_model\.pooler\..*")
"""Lists of numbers that older files hold, and a pooler that Chinese-CLIP does not use."""


def is_hugging_face(folder: Path) -> bool:
    """Tell whether a folder holds one of the two models."""
    path = folder / CONFIG
    return path.is_file() and read_json(path).get("model_type") in (CLIP, CHINESE_CLIP)


def read_hugging_face(folder: Path, config: ConversionConfig) -> Recipe:
    """Understand a folder of transformers; Taiyi's CLIP is one with more ids and positions."""
    record = read_json(folder / CONFIG)
    kind = record["model_type"]
    text = _part(record, "text", _TEXT[kind])
    positions = text["max_position_embeddings"]
    tokenizer = read_tokenizer(
        config,
        str(folder),
        rows=text["vocab_size"],
        positions=positions,
        context_length=chinese_clip.CONTEXT_LENGTH if kind == CHINESE_CLIP else positions,
    )
    model_cfg = hugging_face_model_cfg(record, tokenizer)
    image_size = model_cfg["vision_cfg"]["image_size"]
    preprocess = config.preprocess or read_preprocessing(folder, image_size)
    names = "ChineseCLIPModel" if kind == CHINESE_CLIP else "CLIPModel"
    languages = ("zh",) if kind == CHINESE_CLIP else languages_of(tokenizer)
    return Recipe(
        kind=f"a folder of transformers' {names}",
        tensors=read_tensors(find_weights(folder)),
        origin_of=origin_of,
        allowed=_ALLOWED,
        model_cfg=model_cfg,
        preprocess_cfg=preprocess_cfg(preprocess, image_size),
        tokenizer=tokenizer,
        languages=config.languages or languages,
    )


def hugging_face_model_cfg(record: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return open_clip's description of the model that a `config.json` describes."""
    kind = record["model_type"]
    vision, text = _part(record, "vision", _VISION), _part(record, "text", _TEXT[kind])
    return {
        "embed_dim": record.get("projection_dim", 512),
        "vision_cfg": _sizes(vision)
        | {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": _bert_cfg(text) if kind == CHINESE_CLIP else _clip_text_cfg(text, tokenizer),
        "custom_text": True,
        "quick_gelu": _quick_gelu(vision, text, kind),
    }


def read_preprocessing(folder: Path, image_size: int) -> PreprocessConfig:
    """Read how a folder's images become tensors."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        raise CheckpointError(
            f"{folder} does not say how images become tensors: it has no {PREPROCESSOR}; "
            "expected that file, or --preprocess.mean, .std, .interpolation and .resize_mode"
        )
    record = read_json(path)
    try:
        mean, std = map(float, record["image_mean"]), map(float, record["image_std"])
        interpolation = RESAMPLING[record["resample"]]
        size, crop = record["size"], record.get("crop_size", record["size"])
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}, or it is not one of CLIP's") from error
    mode = _resize_mode(size, crop, crops=record.get("do_center_crop", True), side=image_size)
    if mode is None:
        raise CheckpointError(
            f"{path} resizes to {size} and crops to {crop}; expected images of {image_size} "
            "pixels a side, either cut or squashed"
        )
    return PreprocessConfig(
        mean=_three(mean), std=_three(std), interpolation=interpolation, resize_mode=mode
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _resize_mode(size: Any, crop: Any, *, crops: bool, side: int) -> str | None:
    square = {"height": side, "width": side}
    if size == square and (not crops or crop in (side, square)):
        return "squash"
    shortest = size in (side, {"shortest_edge": side})
    return "shortest" if shortest and crops and crop in (side, square, size) else None


def _part(record: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tower's configuration; older files say it, or parts of it, twice."""
    said = record.get(f"{name}_config") or {}, record.get(f"{name}_config_dict") or {}
    return {**defaults, **said[0], **said[1]}


def _sizes(part: Mapping[str, Any]) -> dict[str, Any]:
    width, eps = part["hidden_size"], part["layer_norm_eps"]
    sizes = {
        "width": width,
        "layers": part["num_hidden_layers"],
        "mlp_ratio": part["intermediate_size"] / width,
    }
    return sizes | ({} if eps == _EPS else {"norm_kwargs": {"eps": eps}})


def _clip_text_cfg(text: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.special_ids.end_of_text
    if text["eos_token_id"] not in (_ARGMAX, end):
        raise CheckpointError(
            f"the text tower pools at id {text['eos_token_id']} and the tokenizer ends texts "
            f"with id {end}; expected the tokenizer that the model was trained with"
        )
    return _sizes(text) | {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "heads": text["num_attention_heads"],
        "pad_id": tokenizer.special_ids.padding,
        # Not by the highest id, which Chinese pieces after the end of text would be.
        "pool_type": "eos",
        "eos_id": end,
    }


def _bert_cfg(text: Mapping[str, Any]) -> dict[str, Any]:
    bert = {name: text[name] for name in _TEXT[CHINESE_CLIP]} | {"model_type": "bert"}
    return chinese_clip.text_cfg(bert)


def _quick_gelu(vision: Mapping[str, Any], text: Mapping[str, Any], kind: str) -> bool:
    # BERT's activation is in its own configuration.
    towers = (vision,) if kind == CHINESE_CLIP else (vision, text)
    found = {tower["hidden_act"] for tower in towers}
    if found not in ({"quick_gelu"}, {"gelu"}):
        raise CheckpointError(
            f"the towers' hidden_act is {' and '.join(sorted(found))}; expected quick_gelu or "
            "gelu, the same for both"
        )
    return found == {"quick_gelu"}


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
