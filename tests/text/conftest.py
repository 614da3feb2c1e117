"""Fixtures of the tests of tokenizers."""

from functools import cache

import jaxtyping
import pytest


@pytest.fixture(scope="session")
def emoji():
    """Return what reads all samples of a split of data/emoji, once and unchecked."""
    from tests.builders import open_split
    from tests.support.commands import ROOT

    @cache
    def samples(split):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
            return list(open_split(ROOT / "data/emoji", split))

    return samples
