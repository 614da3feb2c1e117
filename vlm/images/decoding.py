"""Encoded images to RGB, safely: known formats, bounded size, nothing half read."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from vlm.errors import DataError
from vlm.files import read_file

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 64_000_000
"""An image that claims more is refused before its pixels are unpacked."""

MAX_BYTES = 1 << 28
"""A file with more is refused before it is read."""

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

_QUARTER_TURNS = tuple(_UPRIGHT_BY[orientation] for orientation in (5, 6, 7, 8))


def decode_image(source: ImageSource, *, name: str = "the image") -> Image.Image:
    """Return an upright RGB image, the first frame of several; transparency is laid on white.

    Args:
        source: An open image, which is left as it is, the path of a file or the encoded bytes.
        name: What to call the image in an error where `source` is no path.

    Raises:
        DataError: the file is missing, no JPEG, PNG, WebP or GIF, too large, or damaged.
    """
    if isinstance(source, Image.Image):
        image = read_pixels(source, name=name)
        return image.copy() if image is source else image
    if isinstance(source, Path):
        name = str(source)
    return read_pixels(open_image(source, name=name), name=name)


class EncodedImage:
    """An encoded image, decoded once at each scale that it is asked for.

    Args:
        data: The encoded image.
        name: What to call it in an error.

    Raises:
        DataError: as for `decode_image`; what is wrong with the pixels, when they are asked for.
    """

    def __init__(self, data: bytes, *, name: str = "the image") -> None:
        opened = open_image(data, name=name)
        self.jpeg_size = _upright_size(opened) if _is_jpeg(opened) else None
        """Width and height of an upright JPEG, which alone can be decoded smaller than it is."""
        self._data, self._name = data, name
        self._opened: Image.Image | None = opened
        self._pixels: dict[int, Image.Image] = {}

    def pixels(self, scale: int = 1) -> Image.Image:
        """Return it upright, in RGB, on white; a JPEG's sides may be `scale` times shorter."""
        if scale not in self._pixels:
            # What is open can be read once.
            opened = self._opened or open_image(self._data, name=self._name)
            self._opened = None
            self._pixels[scale] = read_pixels(opened, name=self._name, scale=scale)
        return self._pixels[scale]


def open_image(source: Path | bytes, *, name: str) -> Image.Image:
    """Open an encoded image without reading its pixels; a `DataError` as for `decode_image`."""
    with _errors_of(name):
        data = read_file(source, MAX_BYTES) if isinstance(source, Path) else source
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            # Pillow reads a JPEG's resolution from its EXIF on opening, and gives up on some.
            data = data.replace(b"Exif\0\0", b"none\0\0", 1)
            return Image.open(io.BytesIO(data), formats=FORMATS)


def _is_jpeg(image: Image.Image) -> bool:
    return isinstance(image, JpegImageFile)


def _upright_size(jpeg: Image.Image) -> tuple[int, int]:
    """Return width and height of an open JPEG once it is upright; its EXIF precedes its pixels."""
    width, height = jpeg.size
    return (height, width) if _upright_turn(jpeg) in _QUARTER_TURNS else (width, height)


def jpeg_scale(size: tuple[int, int], shrink: float) -> int:
    """Return how many times smaller a JPEG of a size can be decoded: a power of 2 up to `shrink`.

    Its blocks of 8 x 8 frequencies are unpacked to 4 x 4, 2 x 2 or one pixel.
    """
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(1, min(shrink, *size)))


def read_pixels(image: Image.Image, *, name: str, scale: int = 1) -> Image.Image:
    """Return an open image upright, in RGB, on white; a `DataError` as for `decode_image`.

    Args:
        image: An image of any mode; an upright JPEG in RGB is itself what is returned.
        name: What to call it in an error.
        scale: How many times smaller each side of a JPEG is decoded, a `jpeg_scale`; rounded up.
    """
    with _errors_of(name):
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS} are read")
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        image.load()  # before the EXIF is read, whose errors are ignored and may be those of pixels
        turn = _upright_turn(image)
        upright = image if turn is None else image.transpose(turn)
        if upright.mode.startswith("I"):
            upright = _eight_bits(upright)
        if upright.has_transparency_data:
            transparent = upright.convert("RGBA")
            upright = Image.new("RGBA", transparent.size, "white")
            upright.alpha_composite(transparent)
        # A JPEG holds nothing but its pixels by now; open images of other formats hold decoders.
        return upright if _is_jpeg(upright) and upright.mode == "RGB" else upright.convert("RGB")


def _upright_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns an image as its EXIF orientation says, if anything does.

    `ImageOps.exif_transpose` would write all tags back, and fail on any that has a wrong type.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return _UPRIGHT_BY.get(orientation) if isinstance(orientation, int) else None
    except Exception:  # Pillow's readers of EXIF and XMP raise what the bytes happen to provoke
        return None


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Raise as a `DataError` what Pillow raises for an image that cannot be read."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{name} is not one of {', '.join(FORMATS)}") from error
    except OSError as error:
        what = "cannot be read" if error.strerror else "is damaged"
        raise DataError(f"{name} {what}: {error.strerror or error}") from error
    except (SyntaxError, ValueError, AssertionError, struct.error) as error:
        if "MAX_TEXT" in str(error):  # Pillow raises a plain ValueError for its bounds
            bound = f"{PngImagePlugin.MAX_TEXT_CHUNK >> 20} MiB"
            raise DataError(f"{name} has metadata of more than {bound}") from error
        reason = str(error) or "its parts do not fit together"  # an assertion says nothing
        raise DataError(f"{name} is damaged: {reason}") from error


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
