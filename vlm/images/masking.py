"""Which patches of an image are hidden from its tower."""

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm.errors import ConfigError


def draw_patches(
    batch: int, grid: tuple[int, int], *, share: float, generator: torch.Generator
) -> Bool[Tensor, "batch patches"]:
    """Draw as many patches of each image, uniformly and each image by itself.

    Args:
        batch: Number of images.
        grid: Rows and columns of patches.
        share: Share in [0, 1) of the patches to draw, rounded to a whole number of them.
        generator: Where chance comes from; the result is on its device.

    Returns:
        True at the drawn patches, which are in rows one after the other.

    Raises:
        ConfigError: `share` is out of its range.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"the share of hidden patches is {share}; expected at least 0, below 1")
    patches = grid[0] * grid[1]
    order = torch.rand(batch, patches, generator=generator, device=generator.device).argsort(dim=1)
    # The places of numbers in a random order are a random order themselves.
    return order < round(share * patches)
