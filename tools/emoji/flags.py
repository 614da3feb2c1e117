"""Flags of countries, drawn from the glyphs of a color font."""

import io

from PIL import Image, ImageDraw, ImageFont, features

from tools.drawings import fit_square
from vlm.errors import DataError

# The only size, in pixels, of the glyphs in Noto Color Emoji, and the canvas that holds one.
_GLYPH_SIZE = 109
_GLYPH_CANVAS = (136, 128)
# Wider than this, a flag's letters were not joined into one glyph; narrower, nothing was drawn.
_MAX_GLYPH_WIDTH = 150
_MIN_GLYPH_WIDTH = 60


def require_flag_renderer() -> None:
    """Check that this Python can draw flags.

    Raises:
        DataError: Pillow came without its text layout library.
    """
    if not features.check("raqm"):
        raise DataError(
            "this Pillow cannot join the letters of a flag (it has no raqm); install Pillow's own "
            "wheel with `pip install --force-reinstall pillow`"
        )


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
