"""A Pillow that cannot draw flags is named before anything is fetched."""

import pytest
from PIL import features

from tools.emoji.flags import require_flag_renderer
from vlm.errors import DataError


def test_a_pillow_without_text_layout_is_named(monkeypatch):
    monkeypatch.setattr(features, "check", lambda feature: feature != "raqm")
    with pytest.raises(DataError, match="raqm"):
        require_flag_renderer()
