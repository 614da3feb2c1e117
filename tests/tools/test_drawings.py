"""Images become squares of one size without dark edges, flat on white when encoded."""

import builtins
import io

import pytest
from PIL import Image

from tools.drawings import (
    IMAGE_SIZE,
    decode,
    draw_svg,
    encode,
    fit_square,
    flatten,
    is_blank,
    require_svg_renderer,
)
from vlm.errors import DataError

RED = (255, 0, 0, 255)


def test_scaling_leaves_no_dark_edge():
    image = Image.new("RGBA", (200, 200), (0, 0, 0, 0))  # transparent black
    image.paste(RED, (50, 50, 151, 151))
    scaled = fit_square(image)
    pixels = scaled.get_flattened_data()
    edge = [pixel for pixel in pixels if 8 < pixel[3] < 248]
    assert edge
    assert all(red > 240 for red, _, _, _ in edge)


def test_an_oblong_image_is_centered_on_a_transparent_square():
    square = fit_square(Image.new("RGBA", (64, 32), RED))
    assert square.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert square.getchannel("A").getbbox() == (0, 16, 64, 48)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = Image.effect_noise((IMAGE_SIZE, IMAGE_SIZE), 50).convert("RGBA")
    assert fit_square(image) == image


def test_a_palette_png_is_decoded_to_rgba():
    buffer = io.BytesIO()
    Image.new("RGBA", (72, 72), RED).quantize(4).save(buffer, "PNG")
    image = decode(buffer.getvalue())
    assert (image.mode, image.size) == ("RGBA", (IMAGE_SIZE, IMAGE_SIZE))
    assert image.getpixel((30, 30)) == RED


def test_an_svg_is_drawn_at_the_size_of_the_set():
    image = draw_svg(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">'
        '<path fill="#f00" d="M0 0h8v16H0z"/></svg>'
    )
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image.getpixel((10, 32)) == RED
    assert image.getpixel((50, 32))[3] == 0


@pytest.mark.parametrize(
    ("color", "blank"),
    [
        pytest.param((255, 0, 0, 0), True, id="transparent"),
        pytest.param((255, 255, 255, 255), True, id="white"),
        pytest.param((255, 255, 255, 90), True, id="half-transparent white"),
        pytest.param((250, 255, 255, 255), False, id="nearly white"),
    ],
)
def test_images_on_which_nothing_can_be_seen_are_blank(color, blank):
    assert is_blank(flatten(Image.new("RGBA", (64, 64), color))) == blank


def test_encoded_images_are_rgb_webp_on_white():
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste(RED, (0, 0, 64, 32))
    with Image.open(io.BytesIO(encode(flatten(image)))) as flat:
        assert (flat.format, flat.mode, flat.size) == ("WEBP", "RGB", (64, 64))
        top, bottom = flat.getpixel((32, 10)), flat.getpixel((32, 60))
    assert max(abs(found - wanted) for found, wanted in zip(top, RED, strict=False)) < 10
    assert min(bottom) > 245


def test_equal_images_are_encoded_to_equal_bytes():
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    assert encode(image) == encode(image.copy())


def test_a_missing_svg_renderer_is_named_with_its_remedy(monkeypatch):
    real_import = builtins.__import__

    def without_resvg(name, *args, **kwargs):
        if name == "resvg_py":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_resvg)
    with pytest.raises(DataError, match=r"pip install 'vlm\[emoji\]'"):
        require_svg_renderer()
