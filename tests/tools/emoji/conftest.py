"""Small concepts made by hand."""

import pytest

from tools.emoji.concepts import Concept


@pytest.fixture
def make_concept():
    """Return a function that makes a concept; what a test does not say is filled in."""

    def make(key, *, name="thing", group="objects", subgroup="tool", unicode_name=""):
        return Concept(
            key=key,
            text="".join(chr(int(part, 16)) for part in key.split("-")),
            version="1.0",
            group=group,
            subgroup=subgroup,
            captions={"en": (name,), "zh": (name,), "zh-Hant": (name,)},
            unicode_name=unicode_name,
        )

    return make
