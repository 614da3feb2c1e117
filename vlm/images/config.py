"""How images become tensors, and how training changes them at random."""

from dataclasses import dataclass

from vlm.errors import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How an image becomes a tensor; the fields are those of open_clip's `preprocess_cfg`."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    """Mean of the channels (red, green, blue), which are in [0, 1]."""
    std: tuple[float, float, float] = OPENAI_STD
    """Standard deviation of the channels."""
    interpolation: str = "bicubic"
    """`bicubic` or `bilinear`."""
    resize_mode: str = "shortest"
    """`shortest` cuts the longer side, `longest` pads the shorter one, `squash` distorts."""

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ConfigError(
                f"interpolation is {self.interpolation!r}; expected bicubic or bilinear"
            )
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ConfigError(
                f"resize_mode is {self.resize_mode!r}; expected shortest, longest or squash"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std}; expected numbers above 0")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random changes of a training image; each is drawn evenly from its range."""

    crop_area: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop as a share of evaluation's crop; above 1 leaves a white border."""
    crop_ratio: tuple[float, float] = (0.75, 1.333)
    """Width of the crop over its height, relative to evaluation's (Szegedy et al. 2015)."""
    translation: float = 0.0
    """Largest shift of the crop either way along each axis, as a share of the side."""
    rotation: float = 0.0
    """Largest rotation either way, in degrees."""
    flip: float = 0.0
    """Probability of a left-right flip; images with text or direction are better off at 0."""
    brightness: float = 0.0
    """Largest change of brightness, as a share of it."""
    contrast: float = 0.0
    """Largest change of contrast, as a share of it."""
    saturation: float = 0.0
    """Largest change of saturation, as a share of it."""
    hue: float = 0.0
    """Largest turn of the hue either way, in degrees."""
    grayscale: float = 0.0
    """Probability of losing all colour."""

    def __post_init__(self) -> None:
        ranges = {"crop_area": self.crop_area, "crop_ratio": self.crop_ratio}
        for name, (low, high) in ranges.items():
            if not 0 < low <= high:
                raise ConfigError(f"{name} is {low} to {high}; expected a range above 0")
        for name in ("flip", "grayscale", "brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        for name in ("translation", "rotation", "hue"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 0")
