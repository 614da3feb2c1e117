"""From an SVG, an encoded image or a glyph to a square image of the set's size."""

import io

from PIL import Image, ImageDraw, ImageFont, features

from vlm.errors import DataError

IMAGE_SIZE = 64

_WEBP_QUALITY = 90
# The only size, in pixels, of the glyphs in Noto Color Emoji, and the canvas that holds one.
_GLYPH_SIZE = 109
_GLYPH_CANVAS = (136, 128)
# Wider than this, a flag's letters were not joined into one glyph; narrower, nothing was drawn.
_MAX_GLYPH_WIDTH = 150
_MIN_GLYPH_WIDTH = 60


def require_renderers() -> None:
    """Check that this Python can draw SVGs and flags.

    Raises:
        DataError: resvg-py is missing, or Pillow came without its text layout library.
    """
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise DataError("drawing SVGs needs resvg-py; run `pip install 'vlm[emoji]'`") from error
    if not features.check("raqm"):
        raise DataError(
            "this Pillow cannot join the letters of a flag (it has no raqm); install Pillow's own "
            "wheel with `pip install --force-reinstall pillow`"
        )


def draw_svg(svg: str) -> Image.Image:
    """Draw an SVG; it is rendered at twice the size and then reduced."""
    import resvg_py

    content = resvg_py.svg_to_bytes(svg_string=svg, width=2 * IMAGE_SIZE, skip_system_fonts=True)
    return decode(bytes(content))


def decode(content: bytes) -> Image.Image:
    """Decode a PNG or WebP image and fit it into the square."""
    with Image.open(io.BytesIO(content)) as image:
        return fit_square(image)


def load_glyphs(font: bytes) -> ImageFont.FreeTypeFont:
    """Open Noto Color Emoji so that the letters of a flag join into its glyph."""
    return ImageFont.truetype(io.BytesIO(font), _GLYPH_SIZE, layout_engine=ImageFont.Layout.RAQM)


def draw_flag(glyphs: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """Draw a flag's glyph, or return None where the font has no such flag."""
    if glyphs.getlength(text) > _MAX_GLYPH_WIDTH:
        return None
    image = Image.new("RGBA", _GLYPH_CANVAS)
    ImageDraw.Draw(image).text((0, 0), text, font=glyphs, embedded_color=True)
    box = image.getbbox()
    if box is None or box[2] - box[0] <= _MIN_GLYPH_WIDTH:
        return None
    return fit_square(image)


def fit_square(image: Image.Image) -> Image.Image:
    """Center an image on a transparent square and scale it to the set's size.

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
