"""Which model a configuration or a bundle describes, and how it is built."""

import copy
import difflib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import open_clip
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from vlm.errors import ConfigError
from vlm.models import hugging_face_tower
from vlm.models.bag_of_tokens import BagOfTokens
from vlm.models.config import ModelConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.models.encoder import Encoder
from vlm.models.image_tower import ImageTower, check_image_tower
from vlm.models.multiway import MultiwayEncoder
from vlm.models.multiway_config import MultiwayConfig
from vlm.models.text_tower import TextTower, check_text_tower, feature_width
from vlm.text.tokenizer import Tokenizer

# open_clip's name of the side that is assumed where a config has none.
_DEFAULT_IMAGE_SIZE = 224


def encoder_model_cfg(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the description from which `build_encoder` builds a configured model.

    It is the `model_cfg` with which open_clip builds the same model, or for a multiway one
    `{"multiway": its sizes, "vocab_size": ..., "init_logit_scale": the logarithm}`.

    Raises:
        ConfigError: open_clip has no model of the name, the configuration of its text model is
            not on this machine, or the tokenizer's texts are too long for a multiway model or
            have no piece that begins them.
    """
    scale = {"init_logit_scale": math.log(config.init_logit_scale)}
    bias = config.init_logit_bias
    scale |= {} if bias is None else {"init_logit_bias": bias}
    if config.multiway is not None:
        positions = config.multiway.context_length
        if tokenizer.context_length > positions:
            raise ConfigError(
                f"multiway has positions for {positions} tokens; "
                f"expected at least the tokenizer's context, {tokenizer.context_length}"
            )
        if tokenizer.special_ids.begin_of_text is None:
            raise ConfigError(
                "multiway takes a text's feature from its first token; expected a tokenizer that "
                "begins every text with the same piece"
            )
        sizes = asdict(config.multiway)
        return {"multiway": sizes, "vocab_size": tokenizer.vocab_size} | scale
    if config.open_clip is None:
        towers: dict[str, Any] = {
            "embed_dim": config.embed_dim,
            "vision_cfg": _without_default_stride(asdict(config.vision_cfg)),
            "text_cfg": asdict(config.text_cfg),
        }
    else:
        towers = _zoo_towers(config.open_clip)
    text_cfg = _with_tokenizer(towers["text_cfg"], tokenizer)
    return towers | {"text_cfg": text_cfg, "custom_text": True} | scale


def build_from_config(config: ModelConfig, tokenizer: Tokenizer) -> Encoder:
    """Build an untrained model that reads `tokenizer`'s ids; `ConfigError` where that cannot be."""
    return _build(encoder_model_cfg(config, tokenizer))


def build_encoder(model_cfg: Mapping[str, Any]) -> Encoder:
    """Build a described model with random weights and without the network.

    The description is `encoder_model_cfg`'s, or any `model_cfg` of open_clip's. Scale and bias are
    single numbers here, whatever its `nonscalar_logit_scale` says.

    Raises:
        ConfigError: it is not one that can be built and run.
    """
    if "multiway" in model_cfg:
        return _build(model_cfg)
    vision_cfg = {**model_cfg["vision_cfg"], "timm_model_pretrained": False}
    return _build({**model_cfg, "vision_cfg": vision_cfg})


def image_size(model_cfg: Mapping[str, Any]) -> int:
    """Return the side, in pixels, of the square images that a described model reads.

    Raises:
        ConfigError: they are not square.
    """
    cfg = model_cfg.get("multiway") or model_cfg["vision_cfg"]
    size = cfg.get("image_size", _DEFAULT_IMAGE_SIZE)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"the model's images are of size {size}; expected squares")
    return int(sides.pop())


def _build(model_cfg: Mapping[str, Any]) -> Encoder:
    init_logit_scale = math.exp(model_cfg.get("init_logit_scale", math.log(1 / 0.07)))
    bias = model_cfg.get("init_logit_bias")
    init_logit_bias = None if bias is None else float(bias)
    if "multiway" in model_cfg:
        return MultiwayEncoder(
            MultiwayConfig(**model_cfg["multiway"]),
            vocab_size=model_cfg["vocab_size"],
            init_logit_scale=init_logit_scale,
            init_logit_bias=init_logit_bias,
        )
    return DualEncoder(
        *build_towers(model_cfg),
        init_logit_scale=init_logit_scale,
        init_logit_bias=init_logit_bias,
    )


def _without_default_stride(vision_cfg: dict[str, Any]) -> dict[str, Any]:
    """Leave out what open_clip has no field for, so that it builds all other towers."""
    stride = "timm_output_stride"
    return {k: v for k, v in vision_cfg.items() if k != stride or v is not None}


def _zoo_towers(name: str) -> dict[str, Any]:
    names = open_clip.list_models()
    if name not in names:
        raise _unknown_model("open_clip", name, names)
    described = copy.deepcopy(open_clip.get_model_config(name))
    kept = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    towers = {key: described[key] for key in kept if key in described}
    for side in ("vision_cfg", "text_cfg"):
        # CoCa's towers give tokens to its decoder, which is not here.
        towers[side] = {k: v for k, v in towers[side].items() if k != "output_tokens"}
    return towers


def _with_tokenizer(text_cfg: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a text config with the tokenizer's sizes and special ids in the place of its own."""
    foreign = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
    text_cfg = {name: value for name, value in text_cfg.items() if name not in foreign}
    special = tokenizer.special_ids
    text_cfg |= {"vocab_size": tokenizer.vocab_size, "context_length": tokenizer.context_length}
    if "hf_model_name" in text_cfg:
        hf_config = hugging_face_tower.read_hf_config(text_cfg["hf_model_name"])
        hf_config |= {"vocab_size": tokenizer.vocab_size, "pad_token_id": special.padding}
        # RoBERTa and its kin count positions from the padding's id.
        needed = tokenizer.context_length + special.padding + 1
        if "max_position_embeddings" in hf_config:
            hf_config["max_position_embeddings"] = max(hf_config["max_position_embeddings"], needed)
        return text_cfg | {"hf_config": hf_config, "hf_model_pretrained": False}
    text_cfg |= {"pad_id": special.padding, "eos_id": special.end_of_text}
    # The highest id is the end of text in CLIP's own vocabulary only.
    pool_type = text_cfg.get("pool_type", "argmax")
    return text_cfg | {"pool_type": "eos" if pool_type == "argmax" else pool_type}


def build_towers(model_cfg: Mapping[str, Any]) -> tuple[ImageTower, TextTower]:
    """Build the image tower and the text tower of any of open_clip's models.

    The names of their weights are those of `visual` and `text` in open_clip's `CustomTextCLIP`.
    CoCa's decoder, `multimodal_cfg`, is not a part of them. A text model of transformers is built
    from `text_cfg["hf_config"]`, or from its configuration in the cache; weights and configurations
    are never downloaded, but for an image tower that asks for timm's.
    """
    vision_cfg, text_cfg = dict(model_cfg["vision_cfg"]), dict(model_cfg["text_cfg"])
    name = vision_cfg.get("timm_model_name")
    if name and not timm.is_model(name):
        raise _unknown_model("timm", name, timm.list_models())
    # What open_clip cannot build comes in the place of what it can.
    stride = vision_cfg.pop("timm_output_stride", None)
    is_flat = bool(name) and vision_cfg.get("timm_pool") == "flatten"
    if is_flat:
        vision_cfg["timm_pool"] = "avg"
    is_bag = text_cfg.get("layers") == 0
    if is_bag:
        text_cfg["layers"] = 1
    visual, text = _open_clip_towers(model_cfg, vision_cfg, text_cfg)
    if is_bag:
        text = BagOfTokens(
            vocab_size=text_cfg["vocab_size"],
            width=text_cfg["width"],
            output_dim=model_cfg["embed_dim"],
        )
    check_image_tower(visual)
    check_text_tower(text)
    if feature_width(text) != model_cfg["embed_dim"]:
        raise ConfigError(
            f"the text tower's features are {feature_width(text)} wide without a "
            f"projection; expected embed_dim, {model_cfg['embed_dim']}"
        )
    if stride is not None:
        _set_output_stride(visual, vision_cfg, stride)
    if name:
        _fit_timm_tower(visual, vision_cfg)
    if is_flat:
        _flatten(visual, image_size({"vision_cfg": vision_cfg}))
    return visual, text


def _open_clip_towers(
    model_cfg: Mapping[str, Any], vision_cfg: Mapping[str, Any], text_cfg: Mapping[str, Any]
) -> tuple[ImageTower, TextTower]:
    vision_cfg = {**vision_cfg, "output_tokens": False}
    text_cfg = {**text_cfg, "output_tokens": False}
    with TemporaryDirectory(prefix="vlm-hf-config-") as folder:
        if text_cfg.get("hf_model_name"):  # open_clip reads the model's configuration from there
            hf_config = text_cfg.pop("hf_config", None)
            if hf_config is None:
                hf_config = hugging_face_tower.read_hf_config(text_cfg["hf_model_name"])
            hugging_face_tower.write_hf_config(hf_config, Path(folder))
            text_cfg |= {"hf_model_name": folder, "hf_model_pretrained": False}
        try:
            towers = open_clip.CustomTextCLIP(
                model_cfg["embed_dim"],
                vision_cfg,
                text_cfg,
                quick_gelu=model_cfg.get("quick_gelu", False),
            )
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"the towers cannot be built: {error}") from error
    return towers.visual, towers.text


def _unknown_model(library: str, name: str, names: Sequence[str]) -> ConfigError:
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean one of {', '.join(close)}" if close else "expected one of its zoo"
    return ConfigError(f"{library} has no model {name!r}; {hint}")


def _check_patches(trunk: nn.Module) -> None:
    """Refuse an image that the patches of a resized transformer of timm's do not fill."""
    patches = getattr(trunk, "patch_embed", None)
    if not isinstance(patches, PatchEmbed) or patches.strict_img_size or patches.dynamic_img_pad:
        return
    height, width = patches.img_size or patches.patch_size
    if height % patches.patch_size[0] or width % patches.patch_size[1]:
        raise ConfigError(
            f"image_size is {height}; expected a multiple of the image tower's patches, "
            f"{patches.patch_size[0]}"
        )


def _set_output_stride(visual: ImageTower, vision_cfg: Mapping[str, Any], stride: int) -> None:
    """Give the last map of a timm model another stride: the same weights read a finer map."""
    name, drop_path = vision_cfg["timm_model_name"], vision_cfg.get("timm_drop_path")
    options = {} if drop_path is None else {"drop_path_rate": drop_path}
    try:
        trunk: Any = timm.create_model(name, output_stride=stride, **options)
    except (TypeError, AssertionError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"timm_output_stride is {stride}, which {name} does not take; "
            "expected a stride of the model's, often 8, 16 or 32, or null"
        ) from error
    pool = vision_cfg.get("timm_pool")
    trunk.reset_classifier(0, **({"global_pool": pool} if pool else {}))
    trunk.load_state_dict(cast("nn.Module", visual.trunk).state_dict())
    visual.trunk = trunk


@torch.no_grad()
def _flatten(visual: TimmModel, image_size: int) -> None:
    """Project a convolutional tower's whole last map instead of its mean."""
    projection = getattr(visual.head, "proj", None)
    visual.trunk.reset_classifier(0, global_pool="")
    training, image = visual.trunk.training, torch.zeros(1, 3, image_size, image_size)
    states = visual.trunk.eval()(image)
    visual.trunk.train(training)
    if not isinstance(projection, nn.Linear) or states.ndim != 4:
        raise ConfigError(
            f"timm_pool is flatten, and {type(visual.trunk).__name__} gives states of shape "
            f"{tuple(states.shape)}; expected a convolutional tower with a linear projection"
        )
    bias = projection.bias is not None
    layers = dict(visual.head.named_children())
    layers["proj"] = nn.Linear(states[0].numel(), projection.out_features, bias=bias)
    visual.head = nn.Sequential(OrderedDict(flatten=nn.Flatten(), **layers))


def _fit_timm_tower(visual: TimmModel, vision_cfg: Mapping[str, Any]) -> None:
    """Mend what open_clip's adapter leaves wrong for some of timm's models.

    It does not give a transformer the size of its images, and it reads a projection's width
    from `num_features` even where the model's own head widens its features first.
    """
    trunk = visual.trunk
    if hasattr(trunk, "set_input_size") and "image_size" in vision_cfg:
        trunk.set_input_size(vision_cfg["image_size"])
        _check_patches(trunk)
    projection = getattr(visual.head, "proj", None)
    width = getattr(trunk, "head_hidden_size", None)
    if isinstance(projection, nn.Linear) and width not in (None, projection.in_features):
        bias = projection.bias is not None
        visual.head.proj = nn.Linear(width, projection.out_features, bias=bias)
