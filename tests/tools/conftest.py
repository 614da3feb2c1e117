"""The shipped data folders, each read once."""

from pathlib import Path

import pytest

from vlm.data.manifest import read_manifest
from vlm.data.shards import open_shard

DATA = Path(__file__).parents[2] / "data"


def read_splits(folder):
    """Return the samples of a folder by split; reading them checks every shard's hash."""
    samples = {}
    for split, entries in read_manifest(folder).splits.items():
        shards = [open_shard(folder, entry) for entry in entries]
        samples[split] = [shard[position] for shard in shards for position in range(len(shard))]
    return samples


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
