"""Images to normalised tensors, for evaluation and, with seeded augmentation, for training."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from vlm.errors import ConfigError
from vlm.images.config import AugmentationConfig, PreprocessConfig
from vlm.images.decoding import EncodedImage, jpeg_scale

# ITU-R BT.601 luma and the colour axes of NTSC.
_LUMA = torch.tensor([0.299, 0.587, 0.114])
# numpy multiplies matrices of this size several times as fast as torch.
_YIQ_FROM_RGB = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], np.float32
)
_RGB_FROM_YIQ = torch.linalg.inv(torch.from_numpy(_YIQ_FROM_RGB)).numpy()


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


@dataclass(frozen=True, slots=True)
class _Crop:
    """The rectangle of an image that becomes the model's input, in the image's pixels."""

    width: float
    height: float
    middle_x: float
    middle_y: float
    angle: float
    """Of the rectangle in the image, in radians."""
    mirrored: bool

    def in_smaller(self, scale: int) -> "_Crop":
        """Return the same rectangle in an image that is `scale` times smaller."""
        return replace(
            self,
            width=self.width / scale,
            height=self.height / scale,
            middle_x=self.middle_x / scale,
            middle_y=self.middle_y / scale,
        )


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

    def resized(self, image_size: int) -> "TrainingTransform":
        """Return the same augmentation for images of another size, in pixels."""
        other = copy(self)
        other.image_size = image_size
        return other

    def __call__(self, image: Image.Image, rng: random.Random) -> Float[Tensor, "3 height width"]:
        """Change an RGB image at random and return it as a normalised tensor."""
        crop = self._draw_crop(image.size, rng)
        return self._normalised(self._sample(image, crop), rng)

    def decode(self, image: EncodedImage, rng: random.Random) -> Float[Tensor, "3 height width"]:
        """Decode an image, change it at random and return it as a normalised tensor.

        A JPEG is decoded at the smallest scale at which its crop is no smaller than the model's
        input, and the crop is resized unless it is turned. That takes less time than `__call__` of
        the decoded image, and is close to it; for other formats the tensors are equal.

        Raises:
            DataError: as for `decode_image`.
        """
        if image.jpeg_size is None:
            return self(image.pixels(), rng)
        crop = self._draw_crop(image.jpeg_size, rng)
        scale = jpeg_scale(image.jpeg_size, min(crop.width, crop.height) / self.image_size)
        sample = self._sample if crop.angle else self._resize
        return self._normalised(sample(image.pixels(scale), crop.in_smaller(scale)), rng)

    def _draw_crop(self, size: tuple[int, int], rng: random.Random) -> _Crop:
        config = self.augmentation
        area, ratio = rng.uniform(*config.crop_area), rng.uniform(*config.crop_ratio)
        # The crop that evaluation would make.
        sides = {"squash": size, "longest": (max(size),) * 2}
        whole = sides.get(self._resize_mode, (min(size),) * 2)
        width, height = whole[0] * math.sqrt(area * ratio), whole[1] * math.sqrt(area / ratio)
        # A crop lies anywhere in the image; one that is larger has the image anywhere in it.
        middle_x, middle_y = (
            extent / 2
            + rng.uniform(-1, 1) * abs(extent - crop) / 2
            + rng.uniform(-1, 1) * config.translation * extent
            for extent, crop in zip(size, (width, height), strict=True)
        )
        angle = math.radians(rng.uniform(-config.rotation, config.rotation))
        return _Crop(width, height, middle_x, middle_y, angle, rng.random() < config.flip)

    def _sample(self, image: Image.Image, crop: _Crop) -> UInt8[np.ndarray, "height width 3"]:
        """Sample a crop at the size of the model's input; white where it leaves the image."""
        side = self.image_size
        # The sampler looks at few pixels around each point, so large images are shrunk before.
        shrink = max(1, int(min(crop.width, crop.height) / side))
        image = image.reduce(shrink) if shrink > 1 else image
        mirror = -1 if crop.mirrored else 1
        step_x, step_y = mirror * crop.width / side / shrink, crop.height / side / shrink
        a, b = step_x * math.cos(crop.angle), -step_y * math.sin(crop.angle)
        d, e = step_x * math.sin(crop.angle), step_y * math.cos(crop.angle)
        c = crop.middle_x / shrink - (a + b) * side / 2
        f = crop.middle_y / shrink - (d + e) * side / 2
        sampled = image.transform(
            (side, side), Image.Transform.AFFINE, (a, b, c, d, e, f), self._resampling,
            fillcolor="white",
        )  # fmt: skip
        return np.asarray(sampled)

    def _resize(self, image: Image.Image, crop: _Crop) -> UInt8[np.ndarray, "height width 3"]:
        """Do what `_sample` does, for a crop that is not turned: smoother, and twice as fast.

        The crop begins and ends at whole pixels of the image, the nearest ones.
        """
        side = self.image_size
        (left, right, x, x_end), (top, bottom, y, y_end) = (
            _visible_part(middle, length, extent, side)
            for middle, length, extent in (
                (crop.middle_x, crop.width, image.width),
                (crop.middle_y, crop.height, image.height),
            )
        )
        view = np.full((3, side, side), 255, np.uint8)
        if x < x_end and y < y_end:
            part = torch.from_numpy(np.array(image.crop((left, top, right, bottom))))
            resized = F.interpolate(
                part.permute(2, 0, 1)[None],
                size=(y_end - y, x_end - x),
                mode=self._resampling.name.lower(),
                antialias=True,
            )
            view[:, y:y_end, x:x_end] = resized[0].numpy()
        return (view[:, :, ::-1] if crop.mirrored else view).transpose(1, 2, 0)

    def _normalised(
        self, pixels: UInt8[np.ndarray, "height width 3"], rng: random.Random
    ) -> Float[Tensor, "3 height width"]:
        # Neither step copies: in memory they lie by pixels or by planes, as the image does.
        rows = torch.from_numpy((pixels / np.float32(255)).reshape(-1, 3))
        planes = self._recolour(rows, rng).sub_(self._mean).div_(self._std)
        return planes.view(3, *pixels.shape[:2])

    def _recolour(
        self, pixels: Float[Tensor, "pixels 3"], rng: random.Random
    ) -> Float[Tensor, "3 pixels"]:
        """Change the colours of pixels in [0, 1]; the colours become planes on the way."""
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
        turn = np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]], np.float32)
        colours = _RGB_FROM_YIQ @ turn @ _YIQ_FROM_RGB * (brightness * contrast)
        recoloured = torch.from_numpy(colours) @ pixels.T
        if contrast != 1:
            # It moves away from the image's mean grey, which the other changes leave alone. That is
            # summed pixel by pixel, since the order decides the last bits.
            grey = brightness * float(_LUMA @ pixels.contiguous().mean(dim=0))
            recoloured += (1 - contrast) * grey
        return recoloured.clamp_(0, 1)


def _visible_part(
    middle: float, length: float, extent: int, side: int
) -> tuple[int, int, int, int]:
    """Return which part of a crop shows the image, along one axis.

    Args:
        middle: Of the crop, in the image's pixels.
        length: Of the crop, in the image's pixels.
        extent: Length of the image.
        side: Length of the crop in pixels of its own.

    Returns:
        The part's ends in the image, then in the crop.
    """
    before, after = max(0.0, length / 2 - middle), max(0.0, middle + length / 2 - extent)
    start = min(round(max(0.0, middle - length / 2)), extent - 1)
    end = max(round(min(extent, middle + length / 2)), start + 1)
    return start, end, round(before / length * side), side - round(after / length * side)
