"""Pictures to normalised tensors, for evaluation and, with seeded augmentation, for training."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vlm.errors import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_INTERPOLATION = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
}


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How a picture becomes a tensor; the fields are those of open_clip's `preprocess_cfg`."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    """Mean of the channels (red, green, blue), which are in [0, 1]."""
    std: tuple[float, float, float] = OPENAI_STD
    """Standard deviation of the channels."""
    interpolation: str = "bicubic"
    """`bicubic` or `bilinear`."""
    resize_mode: str = "shortest"
    """`shortest` cuts the longer side, `longest` pads the shorter one, `squash` distorts."""

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATION:
            raise ConfigError(
                f"interpolation is {self.interpolation!r}; expected bicubic or bilinear"
            )
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ConfigError(
                f"resize_mode is {self.resize_mode!r}; expected shortest, longest or squash"
            )


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random changes of a training picture; each is drawn evenly from its range."""

    crop_area: tuple[float, float] = (0.9, 1.0)
    """Share of the picture's area that a random crop keeps (Szegedy et al. 2015)."""
    crop_ratio: tuple[float, float] = (0.75, 1.333)
    """Width of the crop over its height."""
    rotation: float = 0.0
    """Largest rotation either way, in degrees; what comes into view is white."""
    translation: float = 0.0
    """Largest shift either way along each axis, as a share of the side."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Factor by which the picture is enlarged around its middle."""
    flip: float = 0.0
    """Probability of a left-right flip; pictures with text or direction are better off at 0."""
    brightness: float = 0.0
    """Largest change of brightness, as a share of it; likewise the next two."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Largest turn of the colour circle either way, in [0, 0.5]."""
    grayscale: float = 0.0
    """Probability of losing all colour."""


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
    transform: Callable[[Image.Image], Tensor] = image_transform_v2(
        PreprocessCfg(**description), is_train=False
    )
    return transform


class TrainingTransform:
    """Draws every random number from the generator it is given, and from nothing else."""

    def __init__(
        self, preprocess: PreprocessConfig, augmentation: AugmentationConfig, image_size: int
    ) -> None:
        self.preprocess = preprocess
        self.augmentation = augmentation
        self.image_size = image_size
        self._interpolation = _INTERPOLATION[preprocess.interpolation]

    def __call__(self, image: Image.Image, rng: random.Random) -> Float[Tensor, "3 height width"]:
        """Change an RGB picture at random and return it as a normalised tensor."""
        image = self._move(image, rng)
        image = self._crop(image, rng)
        image = self._recolour(image, rng)
        pixels = F.pil_to_tensor(image).float().div_(255)
        normalised: Tensor = F.normalize(
            pixels, list(self.preprocess.mean), list(self.preprocess.std)
        )
        return normalised

    def _move(self, image: Image.Image, rng: random.Random) -> Image.Image:
        config = self.augmentation
        angle = rng.uniform(-config.rotation, config.rotation)
        zoom = rng.uniform(*config.zoom)
        shift = [
            round(rng.uniform(-config.translation, config.translation) * side)
            for side in image.size
        ]
        if angle == 0 and zoom == 1 and shift == [0, 0]:
            return image
        moved: Image.Image = F.affine(
            image, angle=angle, translate=shift, scale=zoom, shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR, fill=[255.0],
        )  # fmt: skip
        return moved

    def _crop(self, image: Image.Image, rng: random.Random) -> Image.Image:
        config = self.augmentation
        area = rng.uniform(*config.crop_area) * image.width * image.height
        ratio = rng.uniform(*config.crop_ratio)
        width = min(image.width, max(1, round((area * ratio) ** 0.5)))
        height = min(image.height, max(1, round((area / ratio) ** 0.5)))
        left = rng.randint(0, image.width - width)
        top = rng.randint(0, image.height - height)
        flip = rng.random() < config.flip
        cropped = image.resize(
            (self.image_size, self.image_size),
            Image.Resampling[self.preprocess.interpolation.upper()],
            box=(left, top, left + width, top + height),
        )
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else cropped

    def _recolour(self, image: Image.Image, rng: random.Random) -> Image.Image:
        config = self.augmentation
        for change, strength in (
            (F.adjust_brightness, config.brightness),
            (F.adjust_contrast, config.contrast),
            (F.adjust_saturation, config.saturation),
        ):
            if strength:
                image = change(image, rng.uniform(max(0.0, 1 - strength), 1 + strength))
        if config.hue:
            image = F.adjust_hue(image, rng.uniform(-config.hue, config.hue))
        if rng.random() < config.grayscale:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        return image
