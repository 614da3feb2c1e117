"""Folders of transformers' `CLIPModel` and `ChineseCLIPModel`, as `save_pretrained` writes them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.checkpoints import chinese_clip
from vlm.checkpoints.accounting import Origin
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.fast_export import fast_files
from vlm.checkpoints.reading import find_weights, read_json, read_tensors
from vlm.checkpoints.recipe import Recipe, languages_of, read_tokenizer
from vlm.errors import CheckpointError, TokenizerError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.text.auto_tokenizer import auto_tokenizer_files
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
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

_CLASSES = {CLIP: "CLIP", CHINESE_CLIP: "ChineseCLIP"}
_DEFAULT_VISION = {"head_width": 64, "mlp_ratio": 4.0, "layers": 12, "width": 768, "patch_size": 16}
_DEFAULT_TEXT = {"heads": 8, "mlp_ratio": 4.0, "layers": 12, "width": 512, "context_length": 77}

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
    if kind == CHINESE_CLIP:
        bert = {name: text[name] for name in _TEXT[CHINESE_CLIP]} | {"model_type": "bert"}
        text_cfg = chinese_clip.text_cfg(bert)
    else:
        text_cfg = _clip_text_cfg(text, tokenizer)
    return {
        "embed_dim": record.get("projection_dim", 512),
        "vision_cfg": _sizes(vision)
        | {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        },
        "text_cfg": text_cfg,
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
    given = record.get(f"{name}_config") or {}, record.get(f"{name}_config_dict") or {}
    return {**defaults, **given[0], **given[1]}


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


def model_config(model_cfg: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model that open_clip's description describes.

    What the file has no place for is left out: reading it back shows what that is.
    """
    vision, text = _DEFAULT_VISION | model_cfg["vision_cfg"], dict(model_cfg["text_cfg"])
    if vision.get("timm_model_name") or not isinstance(vision["layers"], int):
        raise CheckpointError(
            "transformers' CLIP has a vision transformer; the bundle's image tower is "
            f"{vision.get('timm_model_name') or 'a residual network'}"
        )
    bert = text.get("hf_config")
    if bert is not None and bert.get("model_type") != "bert":
        raise CheckpointError(
            f"transformers' ChineseCLIPModel has BERT's text tower, not {bert.get('model_type')}"
        )
    kind = CLIP if bert is None else CHINESE_CLIP
    act = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu"
    written = _written_text(_DEFAULT_TEXT | text, tokenizer, act) if bert is None else bert
    return {
        "architectures": [f"{_CLASSES[kind]}Model"],
        "model_type": kind,
        "projection_dim": model_cfg["embed_dim"],
        "text_config": {**written, "model_type": f"{kind}_text_model"},
        "vision_config": _written_sizes(vision, vision["width"] // vision["head_width"])
        | {
            "model_type": f"{kind}_vision_model",
            "image_size": vision.get("image_size", 224),
            "patch_size": vision["patch_size"],
            "hidden_act": act,
        },
    }


def preprocessor_config(preprocess_cfg: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the `preprocessor_config.json` of an image transform."""
    side, mode = preprocess_cfg["size"], preprocess_cfg["resize_mode"]
    square = {"height": side, "width": side}
    if mode == "longest":
        raise CheckpointError("transformers' CLIP cuts or squashes images; the bundle pads them")
    numbers = {name: number for number, name in RESAMPLING.items()}
    return {
        "image_processor_type": f"{_CLASSES[kind]}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if mode == "squash" else {"shortest_edge": side},
        "resample": numbers[preprocess_cfg["interpolation"]],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_cfg["mean"]),
        "image_std": list(preprocess_cfg["std"]),
    }


def tokenizer_files(tokenizer: Tokenizer) -> tuple[dict[str, bytes], list[str]]:
    """Return the files of a fast tokenizer by name, and sentences on what it does otherwise."""
    if isinstance(tokenizer.vocabulary, SentencePieceVocabulary) and not tokenizer.fast_files:
        return fast_files(tokenizer), []
    try:
        files = auto_tokenizer_files(tokenizer)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    notes = ["the tokenizer mends no broken encodings and HTML entities, as CLIP's cleaning does"]
    return files, notes if tokenizer.config.cleaning == "clip" else []


def _written_text(text: Mapping[str, Any], tokenizer: Tokenizer, act: str) -> dict[str, Any]:
    special = tokenizer.special_ids
    return _written_sizes(text, text["heads"]) | {
        "vocab_size": text.get("vocab_size", tokenizer.vocab_size),
        "max_position_embeddings": text["context_length"],
        "hidden_act": act,
        "bos_token_id": special.begin_of_text,
        "eos_token_id": special.end_of_text,
        "pad_token_id": special.padding,
    }


def _written_sizes(tower: Mapping[str, Any], heads: int) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": round(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", _EPS),
    }
