"""The two towers that an open_clip model config describes, with random weights."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.timm_model import TimmModel
from timm.layers.patch_embed import PatchEmbed
from torch import nn

from vlm.errors import ConfigError
from vlm.models import hugging_face_tower
from vlm.models.image_tower import ImageTower, check_image_tower
from vlm.models.text_tower import TextTower, check_text_tower, feature_width


def build_towers(model_cfg: Mapping[str, Any]) -> tuple[ImageTower, TextTower]:
    """Build the image tower and the text tower of any of open_clip's models.

    The names of their weights are those of `visual` and `text` in open_clip's `CustomTextCLIP`.
    CoCa's decoder, `multimodal_cfg`, is not a part of them.

    Args:
        model_cfg: open_clip's description. A text model of transformers is built from
            `text_cfg["hf_config"]`, or from its configuration in the cache; weights and
            configurations are never downloaded, but for an image tower that asks for timm's.

    Raises:
        ConfigError: the towers cannot be built, or not be run as open_clip runs them.
    """
    vision_cfg = {**model_cfg["vision_cfg"], "output_tokens": False}
    text_cfg = {**model_cfg["text_cfg"], "output_tokens": False}
    name = vision_cfg.get("timm_model_name")
    if name:
        _check_timm_name(name)
    with hugging_face_tower.temporary_folder() as folder:
        if text_cfg.get("hf_model_name"):
            text_cfg = _offline(text_cfg, Path(folder))
        try:
            towers = open_clip.CustomTextCLIP(
                model_cfg["embed_dim"],
                vision_cfg,
                text_cfg,
                quick_gelu=model_cfg.get("quick_gelu", False),
            )
        except (TypeError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"the towers cannot be built: {error}") from error
    check_image_tower(towers.visual)
    check_text_tower(towers.text)
    if feature_width(towers.text) != model_cfg["embed_dim"]:
        raise ConfigError(
            f"the text tower's features are {feature_width(towers.text)} wide without a "
            f"projection; expected embed_dim, {model_cfg['embed_dim']}"
        )
    if name:
        _fit_timm_tower(towers.visual, vision_cfg)
    return towers.visual, towers.text


def _offline(text_cfg: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a text config whose model open_clip reads from a folder, where it is written."""
    hf_config = text_cfg.get("hf_config")
    if hf_config is None:
        hf_config = hugging_face_tower.read_hf_config(text_cfg["hf_model_name"])
    hugging_face_tower.write_hf_config(hf_config, folder)
    known = {name: value for name, value in text_cfg.items() if name != "hf_config"}
    return known | {"hf_model_name": str(folder), "hf_model_pretrained": False}


def _check_timm_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(
            f"timm has no model {name!r}" + (f"; near it are {', '.join(close)}" if close else "")
        )


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


def _fit_timm_tower(visual: TimmModel, vision_cfg: Mapping[str, Any]) -> None:
    """Mend what open_clip's adapter leaves wrong for some of timm's models.

    It does not tell a transformer the size of its images, and it reads a projection's width
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
