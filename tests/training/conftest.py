"""What the tests of training share."""

import pytest

from tests.builders import make_samples, tiny_tokenizer, write_split


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A data folder and a tokenizer folder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_split(folder / "data", make_samples(12))
    write_split(folder / "data", make_samples(12), split="val")
    tiny_tokenizer().save(folder / "tokenizer")
    return folder
