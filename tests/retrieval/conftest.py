"""A data folder, a tiny model's bundle and its embedder, made once.

`vlm` is imported in the fixtures: a conftest may be read before shapes are checked, and what is
imported before is not checked at all.
"""

import pytest


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Return a folder whose split `test` shows 12 concepts twice, in two styles."""
    from tests.builders import make_samples, write_split

    return write_split(tmp_path_factory.mktemp("data"), make_samples(24), split="test")


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    from tests.builders import tiny_bundle

    return tiny_bundle(tmp_path_factory.mktemp("run") / "bundle", context_length=32)


@pytest.fixture(scope="session")
def embedder(bundle):
    from vlm.embedder import Embedder

    return Embedder.load(bundle, device="cpu")
