"""What several files of these tests share."""

import pytest


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VLM_CACHE", str(folder))
    return folder
