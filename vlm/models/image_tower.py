"""open_clip's image towers: the states of patches, patch dropout, and groups of parameters."""

import re
from math import isqrt
from operator import itemgetter
from typing import NamedTuple, TypeAlias, TypeGuard

import torch
from jaxtyping import Bool, Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout, ResidualAttentionBlock, VisionTransformer
from timm.layers.format import Format
from timm.layers.patch_dropout import (
    PatchDropout as TimmPatchDropout,
    PatchDropoutWithIndices,
)
from timm.models import group_parameters
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.attention import run_at_one_position
from vlm.models.batch_norm import temporarily

ImageTower: TypeAlias = VisionTransformer | ModifiedResNet | TimmModel

_SAFE_CHANNELS = 16

_DROPOUTS = (PatchDropout, TimmPatchDropout, PatchDropoutWithIndices)


class PatchLayout(NamedTuple):
    """What `image_states` gives of an image."""

    grid: tuple[int, int]
    """Rows and columns of patches."""
    width: int
    """Width of a patch's state."""


def check_image_tower(visual: ImageTower) -> None:
    """Refuse a tower whose features are not one vector an image."""
    if not isinstance(visual, VisionTransformer):
        return
    if getattr(visual, "attn_pool_contrastive", None) is not None or visual.pool_type == "none":
        raise ConfigError(
            "the image tower pools to more than one vector an image; "
            "expected pool_type tok or avg, and attentional_pool true or false"
        )


def memory_format_of(visual: ImageTower) -> torch.memory_format:
    """Return the layout of a tower's images and weights: channels innermost where it can be.

    Convolutions run up to half as fast again so. But torch 2.14 on a CPU writes past its memory
    in the backward pass of one whose kernel is a single pixel, with a stride and few channels,
    as the stems of timm's FastViT and MobileOne have.
    """
    unsafe = any(
        isinstance(module, nn.Conv2d)
        and max(module.kernel_size) == 1 < max(module.stride)
        and module.in_channels < _SAFE_CHANNELS
        for module in visual.modules()
    )
    return torch.contiguous_format if unsafe else torch.channels_last


def patch_layout(visual: ImageTower) -> PatchLayout:
    """Return how many patches a tower's image has, and how wide their states are.

    A timm model is run on one image of zeros, because no attribute says it for all of them.
    """
    if isinstance(visual, VisionTransformer):
        return PatchLayout(tuple(visual.grid_size), int(visual.transformer.width))
    if isinstance(visual, ModifiedResNet):
        side = visual.image_size // 32  # as its pooling has positions for
        return PatchLayout((side, side), int(visual.attnpool.k_proj.in_features))
    like = next(visual.parameters())
    image = torch.zeros(1, 3, *visual.image_size, dtype=like.dtype, device=like.device)
    with temporarily(visual.modules(), "training", False), torch.no_grad():
        output = _timm_states(visual, image)
    if output.ndim == 4:
        rows, columns, width = _channels_last(visual.trunk, output).shape[1:]
        return PatchLayout((rows, columns), width)
    count, width = _timm_patches(visual.trunk, output).shape[1:]
    return PatchLayout(_timm_grid(visual, count), width)


def features_of(
    visual: ImageTower, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch dim"]:
    """Return the features of images, not normalised: those of the tower itself."""
    features: Tensor
    if not _reads_class_token(visual):
        features = visual(images)
        return features
    states = visual._embeds(images)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        states = block(states)
    pooled = run_at_one_position(last, states, itemgetter((slice(None), 0)))
    features = visual.ln_post(pooled) @ visual.proj
    return features


def states_of(
    visual: ImageTower, images: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch patches states"]]:
    """Return the features of images, not normalised, and the states of all their patches.

    In one pass, whose features are those of the tower itself without patch dropout. States are
    taken after the tower's last normalisation: of open_clip's transformer before the projection,
    or as its attentional pooling reads them; of a convolutional tower before the pooling.
    """
    dropouts = (module for module in visual.modules() if isinstance(module, _DROPOUTS))
    with temporarily(dropouts, "prob", 0.0):
        if isinstance(visual, TimmModel):
            output = _timm_states(visual, images)
            features: Tensor = visual.head(visual.trunk.forward_head(output))
            return features, _timm_patches(visual.trunk, output)
        if isinstance(visual, ModifiedResNet):
            maps = visual.stem(images)
            for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
                maps = layer(maps)
            return visual.attnpool(maps), maps.flatten(2).transpose(1, 2)
        states = visual.transformer(visual._embeds(images))
        norm = visual.ln_post if visual.attn_pool is None else visual.attn_pool.ln_k
        pooled, _ = visual._pool(states)
        return pooled @ visual.proj, norm(states[:, 1:])


def hide_patches(
    images: Float[Tensor, "batch 3 height width"],
    hidden: Bool[Tensor, "batch patches"],
    grid: tuple[int, int],
) -> Float[Tensor, "batch 3 height width"]:
    """Give the pixels of hidden patches the mean colour, which is 0 in normalised images.

    `hidden` is row by row over the grid. Pixels that are left over on the right and below, where
    the grid does not divide the image, belong to the last patches.
    """
    # Grow the grid to pixels one axis at a time: pixel p belongs to cell p // (size // cells),
    # and what is left over on the far side to the last cell.
    blank = hidden.view(len(images), *grid)
    for axis, size in enumerate(images.shape[2:], start=1):
        cells = blank.shape[axis]
        pixels = torch.arange(size, device=hidden.device) // max(1, size // cells)
        blank = blank.index_select(axis, pixels.clamp(max=cells - 1))
    return images.masked_fill(blank[:, None], 0)


def set_patch_dropout(visual: ImageTower, ratio: float) -> None:
    """Leave out a ratio of an image's patches in training (FLIP, Li et al. 2023, section 3).

    Raises:
        ConfigError: the ratio is out of range, or the tower has no patches to drop.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"patch dropout is {ratio}; expected it in [0, 1)")
    trunk = getattr(visual, "trunk", None)
    if isinstance(visual, VisionTransformer):
        visual.patch_dropout = PatchDropout(ratio)
    elif isinstance(trunk, TimmVisionTransformer | Eva):
        kind = PatchDropoutWithIndices if isinstance(trunk, Eva) else TimmPatchDropout
        trunk.patch_drop = kind(ratio, num_prefix_tokens=trunk.num_prefix_tokens)
    elif ratio:
        raise ConfigError(
            f"the image tower, {type(trunk or visual).__name__}, has no patches to drop; "
            "expected a vision transformer, or patch dropout of 0"
        )


def interpolate_positions(visual: ImageTower) -> None:
    """Let a vision transformer of timm stretch its positions for images of other sizes, in place.

    For its own size it computes what it did. Of other towers, convolutional ones need nothing.
    """
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, TimmVisionTransformer) and not trunk.dynamic_img_size:
        # As its constructor does for `dynamic_img_size`.
        trunk.dynamic_img_size = True  # type: ignore[misc]
        trunk.patch_embed.strict_img_size = trunk.patch_embed.flatten = False
        trunk.patch_embed.output_fmt = Format.NHWC


def image_blocks(visual: ImageTower) -> list[nn.Module]:
    """Return the layers that a tower repeats, but for the one that `features_of` runs in part.

    Those of a timm model are its own, if it has any.
    """
    if isinstance(visual, VisionTransformer):
        layers = list(visual.transformer.resblocks)
        return layers[:-1] if _reads_class_token(visual) else layers
    if isinstance(visual, ModifiedResNet):
        stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        return [block for stage in stages for block in stage]
    if not hasattr(visual.trunk, "group_matcher"):
        return []
    matched = visual.trunk.group_matcher()["blocks"]
    patterns = [matched] if isinstance(matched, str) else [pattern for pattern, _ in matched]
    blocks: dict[str, nn.Module] = {}
    for name, module in visual.trunk.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in blocks)
        is_one = any(re.fullmatch(pattern, name) for pattern in patterns)
        if is_one and not within and any(module.children()):
            blocks[name] = module
    return list(blocks.values())


def image_groups(visual: ImageTower) -> list[list[nn.Parameter]]:
    """Return the parameters from the input to the output: embeddings or stem, blocks, head.

    The groups of open_clip's transformer are those of its `lock`; those of timm's models are
    their own, with the projection of open_clip's adapter after them.

    Raises:
        ConfigError: the model of timm does not group its parameters.
    """
    if isinstance(visual, VisionTransformer):
        embeddings = [visual.class_embedding, visual.positional_embedding]
        embeddings += [*visual.conv1.parameters(), *visual.ln_pre.parameters()]
        blocks = [list(block.parameters()) for block in visual.transformer.resblocks]
        blocks[-1] += visual.ln_post.parameters()
        if visual.attn_pool is not None:
            blocks[-1] += visual.attn_pool.parameters()
        return [embeddings, *blocks, [visual.proj]]
    if isinstance(visual, ModifiedResNet):
        stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4, visual.attnpool]
        groups = [list(stage.parameters()) for stage in stages]
        later = {id(parameter) for group in groups for parameter in group}
        return [[each for each in visual.parameters() if id(each) not in later], *groups]
    if not hasattr(visual.trunk, "group_matcher"):
        raise ConfigError(f"timm's {type(visual.trunk).__name__} does not group its parameters")
    by_depth = group_parameters(visual.trunk, visual.trunk.group_matcher(), return_values=True)
    head = list(visual.head.parameters())
    return [by_depth[depth] for depth in sorted(by_depth)] + ([head] if head else [])


def _reads_class_token(visual: ImageTower) -> TypeGuard[VisionTransformer]:
    """Say whether features are those of one position, before which nothing but a norm comes."""
    return (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
    )


def _timm_states(visual: TimmModel, images: Tensor) -> Tensor:
    trunk = visual.trunk
    states = trunk.forward_features(images) if hasattr(trunk, "forward_head") else None
    if not isinstance(states, Tensor) or states.ndim not in (3, 4):
        raise ConfigError(f"timm's {type(trunk).__name__} gives no states of patches")
    return states


def _timm_patches(trunk: nn.Module, states: Tensor) -> Float[Tensor, "batch patches width"]:
    if states.ndim == 4:
        return _channels_last(trunk, states).flatten(1, 2)
    return states[:, getattr(trunk, "num_prefix_tokens", 0) :]


def _channels_last(trunk: nn.Module, maps: Tensor) -> Tensor:
    return maps if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else maps.permute(0, 2, 3, 1)


def _timm_grid(visual: TimmModel, count: int) -> tuple[int, int]:
    grid = getattr(getattr(visual.trunk, "patch_embed", None), "grid_size", None)
    if grid is not None and grid[0] * grid[1] == count:
        return (int(grid[0]), int(grid[1]))
    side = isqrt(count)
    if count == 1 or side * side != count or visual.image_size[0] != visual.image_size[1]:
        raise ConfigError(
            f"timm's {type(visual.trunk).__name__} gives {count} states, which are no grid of "
            f"patches on an image of {visual.image_size}"
        )
    return (side, side)
