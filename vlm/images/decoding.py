"""Encoded images to RGB, safely: known formats, bounded size, nothing half read."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from vlm.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 64_000_000
"""An image that claims more is refused before its pixels are unpacked."""

# Unpacked metadata of one PNG, in bytes. Pillow's bound of 1 MiB refuses images with the colour
# profiles and XMP that Photoshop and renderers write; it is a bound of the whole process.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20

ImageSource = Image.Image | Path | bytes

_UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what turns an image upright; 1 and unknown values are upright already."""


def decode_image(source: ImageSource, *, name: str = "the image") -> Image.Image:
    """Return an upright RGB image, the first frame of several; transparency is laid on white.

    Args:
        source: An open image, the path of a file or the encoded bytes.
        name: What to call the image in an error where `source` is no path.

    Raises:
        DataError: the file is missing, no JPEG, PNG, WebP or GIF, too large, or damaged.
    """
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name)
        if isinstance(source, Path):
            name = str(source)
            source = source.read_bytes()
        with _opened(source) as image:
            return _upright_rgb(image, name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not one of {', '.join(FORMATS)}") from error
    except OSError as error:
        what = "cannot be read" if error.strerror else "is damaged"
        raise DataError(f"{name} {what}: {error.strerror or error}") from error
    except (SyntaxError, ValueError, struct.error) as error:
        if "MAX_TEXT" in str(error):  # Pillow raises a plain ValueError for its bounds
            bound = f"{PngImagePlugin.MAX_TEXT_CHUNK >> 20} MiB"
            raise DataError(f"{name} has metadata of more than {bound}") from error
        raise DataError(f"{name} is damaged: {error}") from error


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        # Pillow reads a JPEG's resolution from its EXIF on opening, and gives up on some blocks.
        return Image.open(io.BytesIO(data.replace(b"Exif\0\0", b"none\0\0", 1)), formats=FORMATS)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS} are read")
    image.load()  # before the EXIF is read, whose errors are ignored and may be those of pixels
    upright = _upright(image)
    if upright.mode.startswith("I"):
        upright = _eight_bits(upright)
    if upright.has_transparency_data:
        transparent = upright.convert("RGBA")
        upright = Image.new("RGBA", transparent.size, "white")
        upright.alpha_composite(transparent)
    return upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says.

    `ImageOps.exif_transpose` would write all tags back, and fail on any that has a wrong type.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        method = _UPRIGHT_BY.get(orientation) if isinstance(orientation, int) else None
    except Exception:  # Pillow's readers of EXIF and XMP raise what the bytes happen to provoke
        method = None
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale integer grey to 8 bits, where Pillow would cut it off at 255."""
    values = np.asarray(image)
    # Files are read as `I;16`; an opened image of mode `I` may hold 8 bits in its 32.
    shift = 0 if image.mode == "I" and 0 <= values.min() <= values.max() <= 255 else 8
    grey = (values >> shift).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is None:
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
