"""Fixtures of the tests of tokenizers."""

from functools import cache

import jaxtyping
import pytest


@pytest.fixture(scope="session")
def emoji():
    """Return what reads all samples of a split of data/emoji, once and unchecked."""
    from tests.support.commands import ROOT
    from vlm.data.dataset import ShardedSplit

    @cache
    def samples(split):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
            return list(ShardedSplit(ROOT / "data/emoji", split))

    return samples
