"""open_clip's checkpoints: a weights file of a model it knows, or a folder that says its model."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg
from torch import Tensor

from vlm.checkpoints.accounting import Origin, OriginOf
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.reading import Tensors, find_weights, read_json, read_tensors
from vlm.checkpoints.recipe import Recipe, languages_of, read_tokenizer
from vlm.errors import CheckpointError, ConfigError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.models.hugging_face_tower import read_hf_config
from vlm.text.tokenizer import Tokenizer

CONFIG = "open_clip_config.json"

_ALLOWED = (r"text_decoder\..*", r".*\.position_ids", r"(text\.)?attn_mask")
"""CoCa's caption decoder, which no feature needs, and what older versions stored needlessly."""

_CLEANING: Mapping[str, Any] = {
    "whitespace": "whitespace",
    "lower": "clip",
    "canonicalize": "canonicalize",
}
"""Our names of what open_clip calls the cleaning of a text."""

_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
_DEFAULT_CONTEXT, _DEFAULT_VOCABULARY = 77, 49_408


def is_open_clip(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors have the names of one of open_clip's models."""
    text = ("text.", "transformer.", "token_embedding.")
    return "logit_scale" in tensors and all(
        any(name.startswith(tower) for name in tensors) for tower in ("visual.", text)
    )


def read_open_clip_file(tensors: Tensors, config: ConversionConfig) -> Recipe:
    """Understand a weights file of the model that `config.model` names."""
    if config.model is None:
        raise CheckpointError(
            "the file has the names of an open_clip model but does not say which; "
            "name it with --model, as `open_clip.list_models()` lists it"
        )
    model_cfg = open_clip.get_model_config(config.model)
    if model_cfg is None:
        raise CheckpointError(
            f"open_clip has no model {config.model!r}; expected one of open_clip.list_models()"
        )
    preprocess = config.preprocess or _published_preprocessing(config.model)
    image_size = model_cfg["vision_cfg"].get("image_size", 224)
    image = preprocess_cfg(preprocess, image_size)
    return _recipe(tensors, model_cfg, image, config, own_tokenizer=None)


def read_open_clip_folder(folder: Path, config: ConversionConfig) -> Recipe:
    """Understand a folder that open_clip reads as `local-dir:`."""
    record = read_json(folder / CONFIG)
    try:
        model_cfg, images_cfg = dict(record["model_cfg"]), dict(record["preprocess_cfg"])
        images_cfg = {name: images_cfg[name] for name in images_cfg if images_cfg[name] is not None}
        images = {"mean": images_cfg["mean"], "std": images_cfg["std"]}
        image_size = model_cfg["vision_cfg"].get("image_size", 224)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} lacks {error}") from error
    if config.preprocess is not None:
        image = preprocess_cfg(config.preprocess, image_size)
    else:
        # What such a file leaves out is open_clip's default, but for mean and std.
        known = asdict(PreprocessCfg(size=image_size))
        image = known | {name: images_cfg[name] for name in images_cfg if name in known} | images
    tensors = read_tensors(find_weights(folder))
    # Without a name open_clip takes its own tokenizer, whatever files lie there.
    named = (folder / "tokenizer.json").is_file() and model_cfg["text_cfg"].get("hf_tokenizer_name")
    own = str(folder) if named else None
    return _recipe(tensors, model_cfg, image, config, own_tokenizer=own)


def open_clip_origin(tensors: Mapping[str, Tensor]) -> OriginOf:
    """Return where our tensors are; the older class `CLIP` has its text tower at the top."""
    old = "token_embedding.weight" in tensors

    def origin_of(name: str) -> Origin:
        if name == "log_logit_scale":
            return Origin(("logit_scale",))
        return Origin((name.removeprefix("text.") if old else name,))

    return origin_of


def _recipe(
    tensors: Tensors,
    model_cfg: Mapping[str, Any],
    image: Mapping[str, Any],
    config: ConversionConfig,
    *,
    own_tokenizer: str | None,
) -> Recipe:
    cfg = _described(model_cfg, config)
    text = cfg["text_cfg"]
    if config.tokenizer is None and own_tokenizer is None and text.get("hf_tokenizer_name"):
        raise CheckpointError(
            f"the model reads the ids of {text['hf_tokenizer_name']}; "
            "name its files with --tokenizer"
        )
    bert = text.get("hf_config", {})
    context_length = text.get("context_length", _DEFAULT_CONTEXT)
    tokenizer = read_tokenizer(
        config,
        own_tokenizer or "clip",
        rows=bert.get("vocab_size", text.get("vocab_size", _DEFAULT_VOCABULARY)),
        positions=bert.get("max_position_embeddings", context_length),
        context_length=context_length,
    )
    if text.get("hf_tokenizer_name"):
        # With what open_clip does before and after a tokenizer of transformers.
        options = text.get("tokenizer_kwargs") or {}
        own = replace(tokenizer.config, cleaning=_CLEANING[options.get("clean", "whitespace")])
        if options.get("strip_sep_token"):  # id 0 takes the place of its end of text
            own = replace(own, end_of_text=tokenizer.vocabulary.pieces()[0])
        tokenizer = Tokenizer(tokenizer.vocabulary, own)
        text |= {} if bert else {"pad_id": tokenizer.special_ids.padding}  # which towers may see
    # Vectors of one in some models.
    scalars = {name: tensors[name] for name in ("logit_scale", "logit_bias") if name in tensors}
    tensors = tensors | {n: t.reshape(()) for n, t in scalars.items() if t.numel() == 1}
    return Recipe(
        kind="an open_clip checkpoint",
        tensors=tensors,
        origin_of=open_clip_origin(tensors),
        allowed=_ALLOWED,
        model_cfg=cfg,
        preprocess_cfg=image,
        tokenizer=tokenizer,
        languages=config.languages or languages_of(tokenizer),
    )


def _described(model_cfg: Mapping[str, Any], config: ConversionConfig) -> dict[str, Any]:
    """Return the description of the dual encoder in a model: without decoder, text tower apart."""
    cfg = deepcopy(dict(model_cfg)) | {"custom_text": True}
    for name in ("multimodal_cfg", "nonscalar_logit_scale"):
        cfg.pop(name, None)
    for tower in ("vision_cfg", "text_cfg"):
        cfg[tower].pop("output_tokens", None)  # for CoCa's decoder
    text = cfg["text_cfg"]
    if config.hf_config is not None and not text.get("hf_model_name"):
        raise CheckpointError(
            "the model has open_clip's own text tower; expected no --hf_config, which is for one "
            "of transformers"
        )
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = False
        if "hf_config" not in text:
            text["hf_config"] = _hf_config(config, text["hf_model_name"])
    for name in ("init_logit_scale", "init_logit_bias"):
        value = cfg.pop(name, None)
        cfg |= {} if value is None else {name: float(value)}  # some are whole numbers
    # Starting temperatures are replaced by the weights; ours stay in their bound.
    if cfg.get("init_logit_scale", 0) > math.log(100):
        del cfg["init_logit_scale"]
    return cfg


def _hf_config(config: ConversionConfig, name: str) -> dict[str, Any]:
    """Return a text tower's own configuration, which open_clip's description only names."""
    path = config.hf_config
    if path is not None:
        return read_json(path / "config.json" if path.is_dir() else path)
    try:
        return read_hf_config(name)
    except ConfigError as error:
        raise CheckpointError(f"{error}; or name its config.json with --hf_config") from error


def _published_preprocessing(model: str) -> PreprocessConfig:
    """Return how images become tensors for every published checkpoint of a model."""
    published = [get_pretrained_cfg(model, tag) for tag in list_pretrained_tags_by_model(model)]
    ways = {tuple((name, one.get(name)) for name in _PREPROCESSING) for one in published}
    if len(ways) != 1:
        found = "differ in it" if ways else "do not exist"
        raise CheckpointError(
            f"a weights file does not say how images become tensors, and published checkpoints "
            f"of {model} {found}; "
            "set them with --preprocess.mean, .std, .interpolation, .resize_mode"
        )
    return PreprocessConfig(**{name: value for name, value in ways.pop() if value is not None})
