"""Images to normalised tensors, for evaluation and, with seeded augmentation, for training."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError
from vlm.images.config import AugmentationConfig, PreprocessConfig

# ITU-R BT.601 luma and the colour axes of NTSC.
_YIQ_FROM_RGB = torch.tensor(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
)
_RGB_FROM_YIQ = torch.linalg.inv(_YIQ_FROM_RGB)
_LUMA = _YIQ_FROM_RGB[0]


def preprocess_cfg(config: PreprocessConfig, image_size: int) -> dict[str, Any]:
    """Return open_clip's description of the transform."""
    return {"size": image_size, "mode": "RGB", "fill_color": 255, **asdict(config)}


def evaluation_transform(
    description: Mapping[str, Any],
) -> Callable[[Image.Image], Float[Tensor, "3 height width"]]:
    """Return open_clip's own transform for a `preprocess_cfg`, so that features agree with it.

    Raises:
        ConfigError: the description is incomplete; preprocessing is never guessed.
    """
    missing = {"size", "mean", "std", "interpolation", "resize_mode"} - set(description)
    if missing:
        raise ConfigError(f"the image preprocessing lacks {', '.join(sorted(missing))}")
    transform = image_transform_v2(PreprocessCfg(**description), is_train=False)
    transform.transforms.insert(0, partial(_without_extreme_sides, **description))
    typed: Callable[[Image.Image], Tensor] = transform
    return typed


def _without_extreme_sides(
    image: Image.Image, *, size: int | Sequence[int], resize_mode: str, **_: Any
) -> Image.Image:
    """Cut or pad a thin image, whose resizing would cost gigabytes or leave no pixel.

    Other images, up to 8 times as long as wide, are returned as they are.
    """
    short, long = sorted(image.size)
    across = image.width < image.height  # the axis that is cut or padded
    if resize_mode == "shortest" and long > 8 * short:
        # The centre crop reads one short side of the long one. Four leave the resampling filter
        # the pixels around it, and an even difference leaves the centre where it was.
        kept = 4 * short + (long - 4 * short) % 2
        first = (long - kept) // 2
        last = first + kept
        box = (0, first, short, last) if across else (first, 0, last, short)
        return image.crop(box)
    side = size if isinstance(size, int) else min(size)
    if resize_mode == "longest" and short * side < long:  # less than a pixel would be left
        return image.resize((1, side) if across else (side, 1))
    return image


class TrainingTransform:
    """Augments an image with random numbers from the generator it is given, and no others.

    Crop, shift, rotation, flip and resizing are one affine map of the plane, and all changes of
    colour are one affine map of RGB: each image is sampled once and multiplied once.
    """

    def __init__(
        self, preprocess: PreprocessConfig, augmentation: AugmentationConfig, image_size: int
    ) -> None:
        self.augmentation = augmentation
        self.image_size = image_size
        self._resize_mode = preprocess.resize_mode
        self._resampling = Image.Resampling[preprocess.interpolation.upper()]
        self._mean = torch.tensor(preprocess.mean)[:, None]
        self._std = torch.tensor(preprocess.std)[:, None]

    def __call__(self, image: Image.Image, rng: random.Random) -> Float[Tensor, "3 height width"]:
        """Change an RGB image at random and return it as a normalised tensor."""
        image = self._sample(image, rng)
        pixels = torch.from_numpy(np.array(image)).view(-1, 3).T.float().div_(255)
        pixels = self._recolour(pixels, rng)
        normalised = pixels.sub_(self._mean).div_(self._std)
        return normalised.view(3, self.image_size, self.image_size)

    def _sample(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """Draw the crop and sample it at the size of the model's input."""
        config, side = self.augmentation, self.image_size
        area, ratio = rng.uniform(*config.crop_area), rng.uniform(*config.crop_ratio)
        # The crop that evaluation would make.
        sides = {"squash": image.size, "longest": (max(image.size),) * 2}
        whole = sides.get(self._resize_mode, (min(image.size),) * 2)
        width, height = whole[0] * math.sqrt(area * ratio), whole[1] * math.sqrt(area / ratio)
        # A crop lies anywhere in the image; one that is larger has the image anywhere in it.
        middle_x, middle_y = (
            extent / 2
            + rng.uniform(-1, 1) * abs(extent - crop) / 2
            + rng.uniform(-1, 1) * config.translation * extent
            for extent, crop in ((image.width, width), (image.height, height))
        )
        angle = math.radians(rng.uniform(-config.rotation, config.rotation))
        mirror = -1 if rng.random() < config.flip else 1
        # The sampler looks at few pixels around each point, so large images are shrunk before.
        shrink = max(1, int(min(width, height) / side))
        image = image.reduce(shrink) if shrink > 1 else image
        step_x, step_y = mirror * width / side / shrink, height / side / shrink
        a, b = step_x * math.cos(angle), -step_y * math.sin(angle)
        d, e = step_x * math.sin(angle), step_y * math.cos(angle)
        c = middle_x / shrink - (a + b) * side / 2
        f = middle_y / shrink - (d + e) * side / 2
        return image.transform(
            (side, side), Image.Transform.AFFINE, (a, b, c, d, e, f), self._resampling,
            fillcolor="white",
        )  # fmt: skip

    def _recolour(
        self, pixels: Float[Tensor, "3 pixels"], rng: random.Random
    ) -> Float[Tensor, "3 pixels"]:
        """Change the colours of pixels in [0, 1]."""
        config = self.augmentation
        brightness, contrast, saturation = (
            1 + rng.uniform(-strength, strength)
            for strength in (config.brightness, config.contrast, config.saturation)
        )
        hue = math.radians(rng.uniform(-config.hue, config.hue))
        if rng.random() < config.grayscale:
            saturation = 0.0
        # Turn and scale the colour (I, Q) of YIQ, and keep its luma Y.
        cosine, sine = saturation * math.cos(hue), saturation * math.sin(hue)
        turn = torch.tensor([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
        colours: Tensor = _RGB_FROM_YIQ @ turn @ _YIQ_FROM_RGB * (brightness * contrast)
        # Contrast moves away from the image's mean grey, which the other changes leave alone.
        grey = brightness * float(_LUMA @ pixels.mean(dim=1))
        return (colours @ pixels).add_((1 - contrast) * grey).clamp_(0, 1)
