"""Encoded pictures to RGB, safely: known formats, bounded size, nothing half read."""

import io
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vlm.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
"""A picture that claims more is refused before its pixels are unpacked."""

ImageSource = Image.Image | Path | bytes


def decode_image(source: ImageSource, *, name: str = "the picture") -> Image.Image:
    """Return an upright RGB picture; transparency is laid on white.

    Args:
        source: An open picture, the path of a file or the encoded bytes.
        name: What to call the picture in an error where `source` is no path.

    Raises:
        DataError: the file is missing, no JPEG, PNG or WebP, too large, or damaged.
    """
    if isinstance(source, Image.Image):
        return _flatten(source)
    if isinstance(source, Path):
        name = str(source)
        try:
            source = source.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the picture {name}: {error.strerror}") from error
    try:
        with Image.open(io.BytesIO(source), formats=FORMATS) as image:
            _check_size(image, name)
            return _flatten(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not one of {', '.join(FORMATS)}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} is damaged: {error}") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS} are read")


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image.copy()
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")
