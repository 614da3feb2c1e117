"""Encoded images to RGB, safely: known formats, bounded size, nothing half read."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000
"""An image that claims more is refused before its pixels are unpacked."""

ImageSource = Image.Image | Path | bytes


def decode_image(source: ImageSource, *, name: str = "the image") -> Image.Image:
    """Return an upright RGB image; transparency is laid on white.

    Args:
        source: An open image, the path of a file or the encoded bytes.
        name: What to call the image in an error where `source` is no path.

    Raises:
        DataError: the file is missing, no JPEG, PNG or WebP, too large, or damaged.
    """
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name)
        if isinstance(source, Path):
            name = str(source)
            source = source.read_bytes()
        with Image.open(io.BytesIO(source), formats=FORMATS) as image:
            return _upright_rgb(image, name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not one of {', '.join(FORMATS)}") from error
    except OSError as error:
        what = "cannot be read" if error.strerror else "is damaged"
        raise DataError(f"{name} {what}: {error.strerror or error}") from error
    except (SyntaxError, ValueError, struct.error) as error:
        raise DataError(f"{name} is damaged: {error}") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS} are read")
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # Pillow would cut 16 bits off at 255 instead of scaling
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.has_transparency_data:
        transparent = upright.convert("RGBA")
        upright = Image.new("RGBA", transparent.size, "white")
        upright.alpha_composite(transparent)
    return upright.convert("RGB")
