"""The shipped data folders, each read once."""

from pathlib import Path

import pytest

from vlm.data.config import SourceConfig
from vlm.data.manifest import read_manifest
from vlm.data.source import open_source

DATA = Path(__file__).parents[2] / "data"


def read_splits(folder):
    """Return the samples of a folder by split; reading them checks every shard's hash."""
    splits = read_manifest(folder).splits
    return {
        split: list(open_source(SourceConfig(path=str(folder), split=split), verify="each_open"))
        for split in splits
    }


@pytest.fixture(scope="session")
def emoji_folder():
    """Return the emoji that ship with the project."""
    return DATA / "emoji"


@pytest.fixture(scope="session")
def emoji_splits(emoji_folder):
    """Return the shipped emoji by split."""
    return read_splits(emoji_folder)


@pytest.fixture(scope="session")
def icons_folder():
    """Return the icons that ship with the project."""
    return DATA / "icons"


@pytest.fixture(scope="session")
def icon_splits(icons_folder):
    """Return the shipped icons by split."""
    return read_splits(icons_folder)
