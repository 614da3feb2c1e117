"""CLIP's two image towers, known by the shapes of their tensors."""

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from vlm.errors import CheckpointError

_HEAD_WIDTH = {1280: 80}  # CLIP's ViT-H; 64 in every other
_STAGES = 4
_REDUCTION = 32  # pixels a side for one position of the last feature map


def image_tower_cfg(tensors: Mapping[str, Tensor], prefix: str = "visual.") -> dict[str, Any]:
    """Return open_clip's `vision_cfg` of a vision transformer or a residual network of CLIP.

    Their names are those of OpenAI's release, which open_clip and Chinese-CLIP keep.
    """
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    try:
        return _residual(own) if "layer1.0.conv1.weight" in own else _transformer(own)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"the image tower's size is unknown: {error} is missing") from error


def count_layers(names: Iterable[str], pattern: str) -> int:
    """Return how many different numbers a pattern's group has among names."""
    return len({found[1] for found in map(re.compile(pattern).match, names) if found})


def _transformer(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = tensors["conv1.weight"].shape
    return {
        "image_size": patch * isqrt(len(tensors["positional_embedding"]) - 1),
        "patch_size": patch,
        "width": width,
        "layers": count_layers(tensors, r"transformer\.resblocks\.(\d+)\."),
        "head_width": _HEAD_WIDTH.get(width, 64),
        "mlp_ratio": len(tensors["transformer.resblocks.0.mlp.c_fc.bias"]) / width,
    }


def _residual(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = range(1, _STAGES + 1)
    return {
        "image_size": _REDUCTION * isqrt(len(tensors["attnpool.positional_embedding"]) - 1),
        "width": len(tensors["layer1.0.conv1.weight"]),
        "layers": [count_layers(tensors, rf"layer{stage}\.(\d+)\.") for stage in stages],
    }
