"""Small concepts made by hand, and the shipped data folder read once."""

from pathlib import Path

import pytest

from tests.builders import open_split
from tools.emoji.concepts import Concept
from vlm.data.manifest import read_manifest


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


@pytest.fixture(scope="session")
def emoji_folder():
    """Return the data folder that ships with the project."""
    return Path(__file__).parents[3] / "data" / "emoji"


@pytest.fixture(scope="session")
def emoji_splits(emoji_folder):
    """Return the shipped samples by split; reading them checks every shard's hash."""
    return {
        split: list(open_split(emoji_folder, split)) for split in read_manifest(emoji_folder).splits
    }
