"""The files that transformers wants beside the weights: configuration, preprocessing, tokenizer."""

from collections.abc import Mapping
from typing import Any

from vlm.checkpoints.fast_export import fast_files
from vlm.checkpoints.hugging_face import CHINESE_CLIP, CLIP, RESAMPLING
from vlm.errors import CheckpointError, TokenizerError
from vlm.text.auto_tokenizer import auto_tokenizer_files
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.tokenizer import Tokenizer

_CLASSES = {CLIP: "CLIP", CHINESE_CLIP: "ChineseCLIP"}
_DEFAULT_VISION = {"head_width": 64, "mlp_ratio": 4.0, "layers": 12, "width": 768, "patch_size": 16}
_DEFAULT_TEXT = {"heads": 8, "mlp_ratio": 4.0, "layers": 12, "width": 512, "context_length": 77}
_EPS = 1e-5


def model_config(model_cfg: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `config.json` of a model that open_clip's description describes.

    What the file has no place for is left out: reading it back shows what that is.

    Raises:
        CheckpointError: a tower is of no kind that CLIP or Chinese-CLIP have.
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
    written = _clip_text(_DEFAULT_TEXT | text, tokenizer, act) if bert is None else bert
    return {
        "architectures": [f"{_CLASSES[kind]}Model"],
        "model_type": kind,
        "projection_dim": model_cfg["embed_dim"],
        "text_config": {**written, "model_type": f"{kind}_text_model"},
        "vision_config": _sizes(vision, vision["width"] // vision["head_width"])
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


def _clip_text(text: Mapping[str, Any], tokenizer: Tokenizer, act: str) -> dict[str, Any]:
    special = tokenizer.special_ids
    return _sizes(text, text["heads"]) | {
        "vocab_size": text.get("vocab_size", tokenizer.vocab_size),
        "max_position_embeddings": text["context_length"],
        "hidden_act": act,
        "bos_token_id": special.begin_of_text,
        "eos_token_id": special.end_of_text,
        "pad_token_id": special.padding,
    }


def _sizes(tower: Mapping[str, Any], heads: int) -> dict[str, Any]:
    return {
        "hidden_size": tower["width"],
        "intermediate_size": round(tower["width"] * tower["mlp_ratio"]),
        "num_hidden_layers": tower["layers"],
        "num_attention_heads": heads,
        "layer_norm_eps": (tower.get("norm_kwargs") or {}).get("eps", _EPS),
    }
