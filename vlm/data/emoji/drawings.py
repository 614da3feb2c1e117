"""From an SVG, an encoded picture or a glyph to a square picture of the set's size."""

import io

from PIL import Image, ImageDraw, ImageFont, features

from vlm.errors import DataError

PICTURE_SIZE = 64

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

    content = resvg_py.svg_to_bytes(svg_string=svg, width=2 * PICTURE_SIZE, skip_system_fonts=True)
    return decode(bytes(content))


def decode(content: bytes) -> Image.Image:
    """Decode a PNG or WebP picture and fit it into the square."""
    with Image.open(io.BytesIO(content)) as picture:
        return fit_square(picture)


def load_glyphs(font: bytes) -> ImageFont.FreeTypeFont:
    """Open Noto Color Emoji so that the letters of a flag join into its glyph."""
    return ImageFont.truetype(io.BytesIO(font), _GLYPH_SIZE, layout_engine=ImageFont.Layout.RAQM)


def draw_flag(glyphs: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """Draw a flag's glyph, or return None where the font has no such flag."""
    if glyphs.getlength(text) > _MAX_GLYPH_WIDTH:
        return None
    picture = Image.new("RGBA", _GLYPH_CANVAS)
    ImageDraw.Draw(picture).text((0, 0), text, font=glyphs, embedded_color=True)
    box = picture.getbbox()
    if box is None or box[2] - box[0] <= _MIN_GLYPH_WIDTH:
        return None
    return fit_square(picture)


def fit_square(picture: Image.Image) -> Image.Image:
    """Center a picture on a transparent square and scale it to the set's size.

    Colors are weighted by their alpha while scaling: the color of a transparent pixel is
    arbitrary, often black, and must not reach the edges of the drawing.
    """
    picture = picture.convert("RGBA")
    width, height = picture.size
    side = max(width, height)
    if width != height:
        square = Image.new("RGBA", (side, side))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture = square
    if side == PICTURE_SIZE:
        return picture
    target = (PICTURE_SIZE, PICTURE_SIZE)
    return picture.convert("RGBa").resize(target, Image.Resampling.LANCZOS).convert("RGBA")


def flatten(picture: Image.Image) -> Image.Image:
    """Put a picture on a white ground; the result is RGB."""
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB")


def is_blank(flat: Image.Image) -> bool:
    """Tell whether nothing can be seen: every pixel is white."""
    return flat.getextrema() == ((255, 255),) * 3


def encode(flat: Image.Image) -> bytes:
    """Encode a picture as lossy WebP."""
    buffer = io.BytesIO()
    flat.save(buffer, "WEBP", quality=_WEBP_QUALITY, method=6)
    return buffer.getvalue()
