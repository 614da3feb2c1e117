"""From an SVG or an encoded image to a square image of the size of our sets."""

import io

from PIL import Image

from vlm.errors import DataError

IMAGE_SIZE = 64

_WEBP_QUALITY = 90


def require_svg_renderer() -> None:
    """Check that this Python can draw SVGs.

    Raises:
        DataError: resvg-py is missing.
    """
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise DataError("drawing SVGs needs resvg-py; run `pip install 'vlm[emoji]'`") from error


def draw_svg(svg: str) -> Image.Image:
    """Draw an SVG; it is rendered at twice the size and then reduced."""
    import resvg_py

    content = resvg_py.svg_to_bytes(svg_string=svg, width=2 * IMAGE_SIZE, skip_system_fonts=True)
    return decode(bytes(content))


def decode(content: bytes) -> Image.Image:
    """Decode a PNG or WebP image and fit it into the square."""
    with Image.open(io.BytesIO(content)) as image:
        return fit_square(image)


def fit_square(image: Image.Image) -> Image.Image:
    """Center an image on a transparent square and scale it to `IMAGE_SIZE`.

    Colors are weighted by their alpha while scaling: the color of a transparent pixel is
    arbitrary, often black, and must not reach the edges of the drawing.
    """
    image = image.convert("RGBA")
    width, height = image.size
    side = max(width, height)
    if width != height:
        square = Image.new("RGBA", (side, side))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    if side == IMAGE_SIZE:
        return image
    target = (IMAGE_SIZE, IMAGE_SIZE)
    return image.convert("RGBa").resize(target, Image.Resampling.LANCZOS).convert("RGBA")


def flatten(image: Image.Image) -> Image.Image:
    """Put an image on a white ground; the result is RGB."""
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image).convert("RGB")


def is_blank(flat: Image.Image) -> bool:
    """Tell whether nothing can be seen: every pixel is white."""
    return flat.getextrema() == ((255, 255),) * 3


def encode(flat: Image.Image) -> bytes:
    """Encode an image as lossy WebP."""
    buffer = io.BytesIO()
    flat.save(buffer, "WEBP", quality=_WEBP_QUALITY, method=6)
    return buffer.getvalue()
