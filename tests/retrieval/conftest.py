"""A data folder, a tiny model's bundle and its embedder, made once."""

import pytest

from tests.builders import make_samples, tiny_bundle, write_split
from vlm.embedder import Embedder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Return a folder whose split `test` shows 12 concepts twice, in two styles."""
    return write_split(tmp_path_factory.mktemp("data"), make_samples(24), split="test")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("run") / "bundle", context_length=32)


@pytest.fixture(scope="session")
def embedder(bundle):
    return Embedder.load(bundle, device="cpu")
