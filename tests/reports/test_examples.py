"""Thumbnails are small, whole and white where the image is transparent."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.builders import encoded, make_image
from vlm.errors import DataError
from vlm.reports.examples import cosine_in_words, thumbnail


def shown(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), (64, 32)), ((30, 300), (6, 64)), ((20, 10), (20, 10)), ((2000, 1), (64, 1))],
)
def test_a_thumbnail_keeps_the_shape_and_is_never_larger_than_the_image(
    file_format, size, expected
):
    small = shown(thumbnail(make_image(1, size=size), side=64, file_format=file_format))
    assert (small.format, small.size) == (file_format, expected)


def test_bytes_files_and_open_images_give_the_same_thumbnail(tmp_path):
    original = make_image(2, size=(120, 90))
    path = tmp_path / "image.png"
    path.write_bytes(encoded(original))
    thumbnails = {
        thumbnail(source, side=64, file_format="PNG")
        for source in (original, path, path.read_bytes())
    }
    assert len(thumbnails) == 1
    assert original.size == (120, 90)
    small = np.asarray(shown(thumbnails.pop()), np.float64)
    assert np.abs(small - np.asarray(original.resize((64, 48)), np.float64)).mean() < 5


def test_transparency_is_white():
    clear = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    small = shown(thumbnail(encoded(clear), side=64, file_format="PNG"))
    assert np.asarray(small.convert("RGB")).min() == 255


def test_what_is_no_image_is_refused():
    with pytest.raises(DataError, match="not one of JPEG, PNG, WEBP"):
        thumbnail(b"<svg/>", side=64, file_format="PNG")


def test_cosines_have_three_digits_and_none_is_left_out():
    assert [cosine_in_words(cosine) for cosine in (0.12345, -1.0, None)] == ["0.123", "-1.000", ""]
