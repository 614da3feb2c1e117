"""Whatever bytes an image of any kind has, it is an RGB image or refused by a `DataError`."""

import random
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from tests.builders import encoded, make_image
from vlm.errors import DataError
from vlm.images.decoding import decode_image

IMAGE = make_image(3, size=(60, 44))
ORIENTATION, RESOLUTION, EXIF_TAGS = 0x0112, 0x011A, 0x8769


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION], tags[RESOLUTION], tags[EXIF_TAGS] = 6, 72.0, {0x9286: b"a comment"}
    return tags


def texts() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * 300, zip=True)
    info.add_text("comment", "x" * 40, zip=True)
    return info


def animated(file_format: str) -> bytes:
    frames = [make_image(number, size=(60, 44)) for number in range(1, 4)]
    return encoded(IMAGE, file_format, save_all=True, append_images=frames)


KINDS = {
    "JPEG": lambda: encoded(IMAGE, "JPEG", exif=exif(), comment=b"x", icc_profile=bytes(200)),
    "progressive JPEG": lambda: encoded(IMAGE, "JPEG", progressive=True),
    "JPEG of inks": lambda: encoded(IMAGE.convert("CMYK"), "JPEG"),
    "JPEG of several images": lambda: animated("MPO"),
    "PNG": lambda: encoded(IMAGE, exif=exif(), pnginfo=texts(), icc_profile=bytes(200)),
    "PNG of a palette": lambda: encoded(IMAGE.convert("P"), transparency=3),
    "PNG of 16 bits": lambda: encoded(IMAGE.convert("L").convert("I;16")),
    "PNG of one bit": lambda: encoded(IMAGE.convert("1")),
    "animated PNG": lambda: animated("PNG"),
    "WebP": lambda: encoded(IMAGE, "WEBP", exif=exif(), icc_profile=bytes(200)),
    "lossless WebP": lambda: encoded(IMAGE.convert("RGBA"), "WEBP", lossless=True),
    "animated WebP": lambda: animated("WEBP"),
    "animated GIF": lambda: animated("GIF"),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Change, drop or insert bytes, half of the time among the first 400."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(min(len(changed), rng.choice([400, len(data)])))
        how = rng.random()
        if how < 0.8:
            changed[place] = (
                changed[place] ^ 1 << rng.randrange(8) if how < 0.6 else rng.randrange(256)
            )
        elif how < 0.9:
            del changed[place : place + rng.randrange(1, 9)]
        else:
            changed[place:place] = rng.randbytes(4)
    return bytes(changed)


def with_right_checksums(png: bytes) -> bytes:
    """Return a PNG with the checksum of each chunk mended: behind it lies what trusts it."""
    parts, place = [png[:8]], 8
    while place + 12 <= len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        content = png[place + 4 : place + 8 + size]
        parts += [png[place : place + 4], content, struct.pack(">I", zlib.crc32(content))]
        place += 12 + size
    return b"".join(parts)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's, on what it passes over
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes_give_an_image_or_a_data_error(kind):
    data, rng = KINDS[kind](), random.Random(kind)
    refused = 0
    for number in range(800):
        changed = damaged(data, rng)
        if "PNG" in kind and number % 2:
            changed = with_right_checksums(changed)
        try:
            assert decode_image(changed).mode == "RGB"
        except DataError:
            refused += 1
    assert 50 < refused < 800
