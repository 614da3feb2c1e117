"""Images become upright RGB on white; what is damaged, unknown or huge is refused by name."""

import io
import random
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.builders import encoded, make_image
from vlm.errors import DataError
from vlm.images.decoding import MAX_PIXELS, decode_image

ORIENTATION = 0x0112
GRAY, RGB = 0, 2

TURNS = {  # EXIF orientation: how the stored rows and columns become the upright image
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, k=-1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, k=1),
}


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return colours * opacity + 255 * (1 - opacity)


def png(width: int, height: int, *, depth: int, colour: int, compressed: bytes) -> bytes:
    """Write a PNG by hand, so that it can claim anything."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", compressed), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def assert_close(image: Image.Image, expected: np.ndarray, *, atol: float) -> None:
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image, np.float64), expected, atol=atol)


@pytest.mark.parametrize(
    ("file_format", "options", "atol"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 24),
        ("JPEG", {"quality": 100, "subsampling": 0}, 4),
    ],
    ids=["PNG", "lossless WebP", "lossy WebP", "JPEG"],
)
def test_the_pixels_of_each_format_come_back(file_format, options, atol):
    ramp = np.linspace(0, 255, 48).astype(np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], ramp[::-1, None]), axis=-1)
    data = encoded(Image.fromarray(pixels), file_format, **options)
    assert_close(decode_image(data), pixels, atol=atol)


def test_a_path_bytes_and_an_open_image_give_the_same_pixels(tmp_path):
    data = encoded(make_image(3, size=(30, 20)))
    (tmp_path / "image.png").write_bytes(data)
    decoded = [
        decode_image(source)
        for source in (data, tmp_path / "image.png", Image.open(io.BytesIO(data)))
    ]
    assert {image.tobytes() for image in decoded} == {make_image(3, size=(30, 20)).tobytes()}
    assert {(image.mode, image.size) for image in decoded} == {("RGB", (30, 20))}


def test_an_open_image_is_not_changed_by_changing_the_result():
    source = make_image(1)
    decode_image(source).paste("black", (0, 0, 40, 40))
    assert source.tobytes() == make_image(1).tobytes()


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_half_transparent_colours_are_laid_on_white(file_format):
    pixels = random_pixels(16, 16, 4)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = encoded(Image.fromarray(pixels, "RGBA"), file_format, **options)
    assert_close(decode_image(data), on_white(pixels[..., :3], pixels[..., 3]), atol=1)


def test_an_open_image_with_transparency_is_laid_on_white():
    pixels = random_pixels(16, 16, 4)
    expected = on_white(pixels[..., :3], pixels[..., 3])
    assert_close(decode_image(Image.fromarray(pixels, "RGBA")), expected, atol=1)


def test_grey_with_transparency_is_laid_on_white():
    pixels = random_pixels(16, 16, 2)
    data = encoded(Image.fromarray(pixels, "LA"))
    colours = np.repeat(pixels[..., :1], 3, axis=-1)
    assert_close(decode_image(data), on_white(colours, pixels[..., 1]), atol=1)


def test_a_palette_with_alpha_is_laid_on_white():
    colours, alpha = random_pixels(256, 3), random_pixels(256, 1)[:, 0]
    indices = random_pixels(16, 16)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    data = encoded(image, transparency=alpha.tobytes())
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert_close(decode_image(data), on_white(colours[indices], alpha[indices]), atol=1)


def test_a_palette_with_one_transparent_colour_is_laid_on_white():
    image = Image.fromarray(np.array([[0, 1], [2, 0]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    decoded = decode_image(encoded(image, transparency=1))
    expected = [[[255, 0, 0], [255, 255, 255]], [[0, 0, 255], [255, 0, 0]]]
    assert np.asarray(decoded).tolist() == expected


def test_a_transparent_shade_of_grey_is_laid_on_white():
    image = Image.fromarray(np.array([[100, 50]], np.uint8))
    decoded = decode_image(encoded(image, transparency=100))
    assert np.asarray(decoded).tolist() == [[[255, 255, 255], [50, 50, 50]]]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_images_without_colour_become_rgb(mode):
    image = Image.new("L", (4, 4), 0)
    image.paste(255, (0, 0, 2, 4))
    decoded = decode_image(encoded(image.convert(mode)))
    assert_close(decoded, np.asarray(image)[..., None].repeat(3, axis=-1), atol=0)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
def test_an_image_is_turned_upright(file_format, orientation):
    stored = np.asarray(make_image(2, size=(48, 32)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    data = encoded(Image.fromarray(stored), file_format, exif=exif, **options.get(file_format, {}))
    atol = 6 if file_format == "JPEG" else 0
    assert_close(decode_image(data), TURNS[orientation](stored), atol=atol)


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ],
    ids=["red", "cyan", "black", "white"],
)
def test_printing_inks_become_colours(ink, colour):
    data = encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    assert_close(decode_image(data), np.broadcast_to(colour, (16, 16, 3)), atol=3)


def test_16_bit_colours_keep_their_upper_byte():
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    data = png(7, 5, depth=16, colour=RGB, compressed=zlib.compress(rows))
    assert_close(decode_image(data), pixels >> 8, atol=1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused_by_its_name(tmp_path, file_format, share):
    data = encoded(Image.fromarray(random_pixels(40, 40, 3)), file_format)
    path = tmp_path / "image.bin"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"image\.bin is damaged"):
        decode_image(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"a text, no image", b"\x89PNG\r\n\x1a\n", b"RIFF", b"<svg></svg>", b"%PDF-1.4"],
    ids=["zero bytes", "text", "PNG signature alone", "RIFF alone", "SVG", "PDF"],
)
def test_what_is_no_image_is_refused_by_its_name(data):
    with pytest.raises(DataError, match=r"sample-7 is (not one of JPEG, PNG, WEBP|damaged)"):
        decode_image(data, name="sample-7")


@pytest.mark.parametrize("file_format", ["BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused_whatever_the_file_is_called(tmp_path, file_format):
    (tmp_path / "image.png").write_bytes(encoded(make_image(0), file_format))
    with pytest.raises(DataError, match=r"image\.png is not one of JPEG, PNG, WEBP"):
        decode_image(tmp_path / "image.png")


# Pillow itself warns above 89 million pixels; a warning is no refusal outside of tests.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height"),
    [(8_001, 8_000), (9_000, 9_000), (12_000, 12_000), (60_000, 60_000)],
    ids=["one column too many", "81 MP", "144 MP", "3.6 GP"],
)
def test_a_huge_claimed_size_is_refused_without_unpacking_it(width, height):
    packer = zlib.compressobj(1)
    row = b"\0" * (width + 1)
    compressed = b"".join(packer.compress(row) for _ in range(2_000)) + packer.flush()
    data = png(width, height, depth=8, colour=GRAY, compressed=compressed)
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(
        DataError,
        match=rf"bomb has {width} x {height} pixels; at most {MAX_PIXELS}|bomb is too large",
    ):
        decode_image(data, name="bomb")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_maxrss - before.ru_maxrss < 20_000  # kB; one byte a pixel would be 81,000
    assert after.ru_utime - before.ru_utime < 0.5


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file"):
        decode_image(tmp_path / "gone.png")


def test_a_folder_in_the_place_of_an_image_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} cannot be read: Is a directory"):
        decode_image(tmp_path)


def test_sixteen_bits_of_grey_are_scaled_to_eight():
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(grey))))
    np.testing.assert_array_equal(decoded, np.repeat((grey >> 8)[..., None], 3, axis=2))


def test_a_transparent_colour_without_an_alpha_channel_is_laid_on_white():
    image = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    decoded = decode_image(encoded(image, transparency=(255, 0, 0)))
    assert np.asarray(decoded).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_an_open_image_is_treated_as_its_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(make_image(1, size=(48, 32)), exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(
            np.asarray(decode_image(opened)), np.asarray(decode_image(data))
        )
    with (
        Image.open(io.BytesIO(data[: len(data) // 2])) as cut,
        pytest.raises(DataError, match="damaged"),
    ):
        decode_image(cut)


def with_exif(tags: list[tuple[int, int, int, bytes]], *, offset: int = 8) -> bytes:
    """Return a red JPEG of 48 x 40 pixels with EXIF tags (tag, type, count, value), big-endian."""
    start = 8 + 2 + 12 * len(tags) + 4
    values, entries = b"", struct.pack(">H", len(tags))
    for tag, kind, count, value in tags:
        inline = value.ljust(4, b"\0")
        if len(value) > 4:
            inline = struct.pack(">L", start + len(values))
            values += value
        entries += struct.pack(">HHL", tag, kind, count) + inline
    tiff = b"MM\0*" + struct.pack(">L", offset) + entries + bytes(4) + values
    block = b"Exif\0\0" + tiff
    plain = encoded(Image.new("RGB", (48, 40), "red"), "JPEG")
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]


@pytest.mark.parametrize(
    "tag",
    [
        (0x011A, 2, 3, b"72\0"), (0x011A, 7, 8, bytes(8)), (0x0128, 5, 1, bytes([0, 0, 0, 1] * 2)),
    ],
    ids=["resolution as text", "resolution as bytes", "unit as fraction"],
)  # fmt: skip
def test_a_wrongly_typed_exif_tag_does_not_keep_an_image_from_being_turned(tag):
    upright = decode_image(with_exif([(ORIENTATION, 3, 1, struct.pack(">H", 6)), tag]))
    assert upright.size == (40, 48)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's, on each tag that it skips
def test_no_exif_makes_an_intact_image_damaged():
    rng = random.Random(0)
    for _ in range(1500):
        tags = [
            (
                rng.choice([ORIENTATION, 0x011A, 0x0128, 0x8769, 0x8825, rng.randrange(1 << 16)]),
                rng.randrange(15), rng.choice([0, 1, 2, 8, 1 << 31]),
                rng.randbytes(rng.choice([1, 4, 9])),
            )
            for _ in range(rng.randint(1, 6))
        ]  # fmt: skip
        image = decode_image(with_exif(tags, offset=rng.choice([0, 8, 8, 1 << 31])))
        assert sorted(image.size) == [40, 48]


@pytest.mark.parametrize("size", [3_000_000, 20_000_000])
def test_large_metadata_is_read_within_a_bound_and_named_beyond_it(size):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * size, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(buffer, "PNG", pnginfo=info)
    if size < 16 << 20:
        assert decode_image(buffer.getvalue()).getpixel((3, 3)) == (255, 0, 0)
    else:
        with pytest.raises(DataError, match="x has metadata of more than 16 MiB"):
            decode_image(buffer.getvalue(), name="x")


def test_sixteen_bits_of_grey_keep_their_transparent_shade():
    values = np.full((20, 20), 0x8000, np.uint16)
    values[10:] = 0x4000
    data = encoded(Image.fromarray(values), "PNG", transparency=0x8000)
    image = decode_image(data)
    assert image.getpixel((3, 3)) == (255, 255, 255)
    assert image.getpixel((3, 13)) == (0x40, 0x40, 0x40)


def test_an_open_integer_image_of_eight_bits_keeps_its_values():
    assert decode_image(Image.fromarray(np.full((9, 9), 200, np.int32))).getpixel((3, 3))[0] == 200


def test_the_first_frame_of_a_gif_is_read():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(buffer.getvalue()).getpixel((3, 3)) == (255, 0, 0)
