"""Hidden patches are drawn evenly, as many of every image."""

import pytest
import torch

from vlm.batches.collate import draw_patches
from vlm.errors import ConfigError


def draw(batch, grid, ratio, seed=0):
    return draw_patches(batch, grid, ratio=ratio, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("grid", "ratio", "expected"), [((14, 14), 0.4, 78), ((3, 5), 0.5, 8), ((4, 4), 0.0, 0)]
)
def test_every_image_has_the_same_number_of_hidden_patches(grid, ratio, expected):
    hidden = draw(20, grid, ratio)
    assert hidden.shape == (20, grid[0] * grid[1])
    assert hidden.sum(1).tolist() == [expected] * 20


def test_every_patch_is_hidden_as_often_as_the_others():
    often = draw(20_000, (3, 4), 1 / 3).float().mean(0)
    torch.testing.assert_close(often, torch.full((12,), 1 / 3), atol=0.015, rtol=0)


def test_patches_are_hidden_independently_of_their_neighbours():
    hidden = draw(20_000, (2, 3), 0.5).float()
    # Three of six: a patch beside a hidden one is hidden in two cases of five.
    together = hidden.T @ hidden / len(hidden)
    expected = torch.full((6, 6), 0.5 * 2 / 5).fill_diagonal_(0.5)
    torch.testing.assert_close(together, expected, atol=0.02, rtol=0)


def test_the_generator_decides():
    assert draw(8, (4, 4), 0.5).equal(draw(8, (4, 4), 0.5))
    assert not draw(8, (4, 4), 0.5).equal(draw(8, (4, 4), 0.5, seed=1))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ConfigError, match="ratio of hidden patches"):
        draw(1, (2, 2), ratio)
