"""Training decodes JPEGs no larger than it needs them, and sees what it would see in full."""

import io
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from tests.builders import encoded, make_image
from tests.images.test_decoding import ORIENTATION, TURNS
from vlm.errors import DataError
from vlm.images import decoding
from vlm.images.config import AugmentationConfig, PreprocessConfig
from vlm.images.decoding import EncodedImage, decode_image
from vlm.images.transforms import TrainingTransform

SIZE = 32
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
WHOLE = {"crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
STRONG = {
    "crop_area": (0.3, 1.3), "translation": 0.2, "flip": 0.5, "brightness": 0.4, "contrast": 0.4,
    "saturation": 0.4, "hue": 30.0, "grayscale": 0.2,
}  # fmt: skip


def photo(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Draw noise whose detail is that of photographs: the finer, the fainter."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    for cells, strength in ((3, 40), (9, 20), (27, 8), (81, 3)):
        noise = rng.normal(0, strength, (cells, cells, 3)) + 128
        coarse = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 128.0
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    return encoded(image, "JPEG", **({"quality": 92} | options))


def transform(*, side: int = SIZE, resize_mode: str = "squash", **fields: object):
    config = AugmentationConfig(**(WHOLE | fields))
    return TrainingTransform(PreprocessConfig(resize_mode=resize_mode, **PLAIN), config, side)


def decode(data: bytes | EncodedImage, seed: int = 0, **fields: object) -> torch.Tensor:
    image = EncodedImage(data, name="sample-7") if isinstance(data, bytes) else data
    return transform(**fields).decode(image, random.Random(seed))


def in_full(data: bytes, seed: int = 0, **fields: object) -> torch.Tensor:
    """Return what is made of the image decoded in full, by the sampler of all formats."""
    return transform(**fields)(decode_image(data), random.Random(seed))


def psnr(found: torch.Tensor, expected: np.ndarray) -> float:
    """Peak signal-to-noise ratio in decibels, of values in [0, 1]."""
    difference = found.double().numpy() - expected
    return float(-10 * np.log10(np.mean(difference**2)))


def assert_alike(found: torch.Tensor, expected: torch.Tensor, *, mean: float = 0.03) -> None:
    """Allow for another filter and for half a pixel; a wrong turn or flip makes a mean of 0.08."""
    assert (found - expected).abs().mean() < mean


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("rotation", [0.0, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_other_formats_give_the_tensor_of_the_decoded_image(file_format, rotation, seed):
    data = encoded(photo(90, 70), file_format)
    one, other = random.Random(seed), random.Random(seed)
    augment = transform(resize_mode="shortest", rotation=rotation, **STRONG)
    assert torch.equal(augment.decode(EncodedImage(data), one), augment(decode_image(data), other))
    assert one.getstate() == other.getstate()


@pytest.mark.parametrize("rotation", [0.0, 20.0])
def test_a_jpeg_draws_the_same_random_numbers_as_its_decoded_image(rotation):
    augment = transform(rotation=rotation, **STRONG)
    one, other = random.Random(1), random.Random(1)
    augment.decode(EncodedImage(jpeg(photo(90, 70))), one)
    augment(photo(90, 70), other)
    assert one.getstate() == other.getstate()


@pytest.fixture
def reads(monkeypatch):
    """Note the scale, size and mode of everything that is decoded."""
    found: list[tuple[int, tuple[int, int], str]] = []
    original = decoding.read_pixels

    def noted(image: Image.Image, *, name: str, scale: int = 1) -> Image.Image:
        pixels = original(image, name=name, scale=scale)
        found.append((scale, pixels.size, pixels.mode))
        return pixels

    monkeypatch.setattr(decoding, "read_pixels", noted)
    return found


@pytest.mark.parametrize(
    ("factor", "scale"),
    [(0.5, 1), (1, 1), (1.9, 1), (2, 2), (3.9, 2), (4, 4), (7.9, 4), (8, 8), (20, 8)],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_its_crop_allows(factor, scale, reads):
    width, height = round(SIZE * factor), round(SIZE * factor) + 3
    decode(jpeg(photo(width, height)))
    assert reads == [(scale, (-(-width // scale), -(-height // scale)), "RGB")]


def test_the_scale_of_a_jpeg_follows_from_its_crop_and_not_from_the_image(reads):
    image = EncodedImage(jpeg(photo(4 * SIZE, 4 * SIZE)))
    decode(image, crop_area=(0.26, 0.26))
    decode(image, crop_area=(0.24, 0.24))
    assert [scale for scale, *_ in reads] == [2, 1]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "size", [(64, 64), (150, 110), (149, 211), (300, 301), (411, 263), (1100, 800)], ids=str
)
@pytest.mark.parametrize("side", [64, 96])
def test_a_jpeg_decoded_smaller_is_close_to_the_full_image_resized(size, side, interpolation):
    data = jpeg(photo(*size))
    resampling = Image.Resampling[interpolation.upper()]
    full = Image.open(io.BytesIO(data)).resize((side, side), resampling)
    preprocess = PreprocessConfig(resize_mode="squash", interpolation=interpolation, **PLAIN)
    augment = TrainingTransform(preprocess, AugmentationConfig(**WHOLE), side)
    found = augment.decode(EncodedImage(data), random.Random(0))
    assert psnr(found, np.asarray(full).transpose(2, 0, 1) / 255) > 38


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("rotation", [0.0, 25.0])
@pytest.mark.parametrize("size", [(40, 30), (75, 130), (290, 201)], ids=str)
def test_crops_of_a_jpeg_lie_where_those_of_the_decoded_image_do(size, rotation, resize_mode):
    fields = {"resize_mode": resize_mode, "rotation": rotation, "side": 48} | STRONG
    for seed in range(5):
        data = jpeg(photo(*size, seed=seed), subsampling=0)
        assert_alike(decode(data, seed, **fields), in_full(data, seed, **fields), mean=0.015)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("factor", [1, 4])
def test_a_jpeg_is_upright_whatever_its_scale(orientation, factor):
    stored = photo(48 * factor, 32 * factor)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    fields = {"resize_mode": "shortest", "crop_area": (0.5, 0.6)}
    upright = Image.fromarray(TURNS[orientation](np.asarray(stored)).copy())
    for seed in range(3):
        found = decode(jpeg(stored, exif=exif), seed, **fields)
        assert_alike(found, transform(**fields)(upright, random.Random(seed)))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_of_another_mode_is_decoded_smaller_as_well(mode, reads):
    data = jpeg(photo(130, 130).convert(mode))
    found = decode(data)
    assert [(scale, mode) for scale, _, mode in reads] == [(4, "RGB")]
    assert_alike(found, in_full(data))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("size", [40, 300])
def test_a_truncated_jpeg_is_refused_by_its_name_whatever_its_scale(size, share):
    data = jpeg(photo(size, size))
    with pytest.raises(DataError, match="sample-7 is damaged"):
        decode(data[: int(len(data) * share)])


def test_a_jpeg_that_claims_to_be_huge_is_refused_before_it_is_decoded():
    data = jpeg(make_image(0))
    sizes = struct.pack(">HH", 40, 40)
    assert data.count(sizes) == 1
    with pytest.raises(DataError, match="sample-7 has 9000 x 8000 pixels; at most"):
        decode(data.replace(sizes, struct.pack(">HH", 8000, 9000)))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_an_image_is_decoded_once_at_each_scale_and_gives_the_same_tensors(file_format, reads):
    data = encoded(photo(200, 170), file_format)
    fields = {"resize_mode": "shortest", "crop_area": (0.01, 1.2), "flip": 0.5}
    expected = [decode(data, seed, **fields) for seed in range(30)]
    reads.clear()
    image = EncodedImage(data)
    for seed in range(30):
        assert torch.equal(decode(image, seed, **fields), expected[seed])
    assert sorted(scale for scale, *_ in reads) == ([1, 2, 4] if file_format == "JPEG" else [1])


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (90, 7), (1, 5_000), (700, 300)], ids=str)
def test_jpegs_of_any_shape_become_squares(size, resize_mode):
    data = jpeg(Image.new("RGB", size, "black"))
    for seed in range(10):
        found = decode(data, seed, resize_mode=resize_mode, **STRONG)
        assert found.shape == (3, SIZE, SIZE)
        assert found.dtype == torch.float32
        assert found.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (40, 40)], ids=str)
def test_a_crop_inside_a_jpeg_has_no_white_edge(size):
    data = jpeg(Image.new("RGB", size, "black"))
    for seed in range(20):
        assert decode(data, seed, crop_area=(0.05, 1.0)).max() < 0.01


def test_what_lies_beyond_a_jpeg_is_white():
    found = decode(jpeg(Image.new("RGB", (50, 50), "black")), crop_area=(4.0, 4.0))
    assert (found < 0.5).float().mean() == pytest.approx(0.25, abs=0.04)
    assert ((found < 0.02) | (found > 0.98)).all()


def test_a_certain_flip_mirrors_a_jpeg():
    data = jpeg(photo(60, 50))
    assert torch.equal(decode(data, flip=1.0), decode(data).flip(2))
