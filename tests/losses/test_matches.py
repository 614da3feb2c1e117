"""Several positives, ignored duplicates and missing captions against dense masks."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.support.dense_loss import matches, sigmoid_definition, softmax_definition
from tests.support.processes import run_in_world
from vlm.losses.contrastive import ContrastiveLoss, PairIds
from vlm.losses.matches import OwnPairs, SharedIds, Tile, tiles
from vlm.losses.plan import LossPlan
from vlm.text.caption_ids import NO_CAPTION

LOCAL, DIM = 4, 5
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def batch(samples, missing):
    """Features and ids with repeated images, repeated captions and, if asked, missing ones."""
    generator = torch.Generator().manual_seed(samples)
    images, texts = (
        F.normalize(torch.randn(samples, DIM, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    image_ids = torch.randint(0, samples - 1, (samples,), generator=generator)
    caption_ids = torch.randint(0, samples - 1, (samples,), generator=generator)
    if missing:
        caption_ids[torch.rand(samples, generator=generator) < missing] = NO_CAPTION
    return images, texts, image_ids, caption_ids


def definition(kind, duplicates, smoothing, images, texts, scale, bias, ids):
    """The loss of the samples that have a caption."""
    present = ids[1] != NO_CAPTION
    if not present.any():
        return (images.sum() + texts.sum() + scale + bias) * 0
    images, texts = images[present], texts[present]
    same = matches(ids[0][present].tolist(), ids[1][present].tolist())
    masks = {"positives": same}
    if duplicates == "ignore":
        own = torch.eye(len(images), dtype=torch.bool)
        masks = {"positives": own, "ignored": same & ~own}
    if kind == "sigmoid":
        return sigmoid_definition(images, texts, scale, bias, **masks)
    return softmax_definition(images, texts, scale, smoothing=smoothing, **masks)


def leaves_of(images, texts):
    scalars = (torch.tensor(value, dtype=torch.float64) for value in (7.0, -2.0))
    return [each.clone().requires_grad_() for each in (images, texts, *scalars)]


CASES = [
    (kind, duplicates, smoothing, missing)
    for kind, duplicates, smoothing, missing in itertools.product(
        ("softmax", "sigmoid"), ("positive", "ignore"), (0.0, 0.2), (0.0, 0.4, 1.0)
    )
    if not (kind == "sigmoid" and smoothing)
]


VARIANTS = list(itertools.product((1, 3, 100), (True, False)))
"""Tiles, and whether logits are kept."""


def reference(world, groups, case):
    """The loss and its gradients on one process."""
    kind, duplicates, smoothing, missing = case
    images, texts, *ids = batch(LOCAL * world, missing)
    leaves = leaves_of(images, texts)
    per_group = LOCAL * world // groups
    losses = [
        definition(
            kind, duplicates, smoothing, leaves[0][rows], leaves[1][rows], *leaves[2:],
            [each[rows] for each in ids],
        )
        for rows in (slice(k * per_group, (k + 1) * per_group) for k in range(groups))
    ]  # fmt: skip
    loss = torch.stack(losses).mean()
    loss.backward()
    return [loss.detach(), *gradients_of(leaves, kind)]


def gradients_of(leaves, kind):
    """The gradients by images, texts, scale and bias; a softmax has no bias."""
    *others, bias = leaves
    of_bias = bias.grad if kind == "sigmoid" else torch.zeros_like(bias)
    return [*(leaf.grad for leaf in others), of_bias]


def _results(rank, world, groups):
    """For every case and variant, this rank's loss and gradients, each stacked into one."""
    own = slice(rank * LOCAL, (rank + 1) * LOCAL)
    found = []
    for case in CASES:
        kind, duplicates, smoothing, missing = case
        images, texts, *ids = (each[own] for each in batch(LOCAL * world, missing))
        for tile, keep in VARIANTS:
            leaves = leaves_of(images, texts)
            plan = LossPlan(
                kind=kind, duplicates=duplicates, label_smoothing=smoothing, tile=tile,
                keep_logits=keep, group_size=world // groups,
            )  # fmt: skip
            bias = leaves[3] if kind == "sigmoid" else None
            output = ContrastiveLoss(plan)(*leaves[:3], bias, PairIds(*ids))
            output.loss.backward()
            found.append((output.loss.detach(), *gradients_of(leaves, kind)))
    return [torch.stack(each) for each in zip(*found, strict=True)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "groups"),
    [(1, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((4, 1), (4, 2), (6, 1)))],
)
def test_matches_across_ranks_are_those_of_dense_masks(world, groups):
    """Identity 9, with captions missing on some samples or on all."""
    results = [_results(0, 1, 1)] if world == 1 else run_in_world(_results, world, world, groups)
    losses, images, texts, scales, biases = zip(*results, strict=True)
    # The mean over ranks of the losses, so that a rank has a share of each gradient.
    shares = [torch.cat(each, dim=1) / world for each in (images, texts)]
    means = [torch.stack(each).mean(0) for each in (losses, scales, biases)]
    found = zip(means[0], *shares, *means[1:], strict=True)
    wrong = []
    for case in CASES:
        expected = reference(world, groups, case)
        for variant, numbers in zip(VARIANTS, found, strict=False):
            pairs = zip(numbers, expected, strict=True)
            errors = [(one - other).abs().max() for one, other in pairs]
            if not all(error <= 1e-12 for error in errors):
                wrong.append((case, variant, errors))
    assert not wrong
    assert next(found, None) is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_that_of_torch_in_both_directions(smoothing):
    """Identity 9."""
    images, texts, *_ = batch(9, 0)
    reference, leaves = leaves_of(images, texts), leaves_of(images, texts)
    logits = reference[2] * reference[0] @ reference[1].T
    own = torch.arange(9)
    expected = sum(
        F.cross_entropy(each, own, label_smoothing=smoothing) / 2 for each in (logits, logits.T)
    )
    expected.backward()
    output = ContrastiveLoss(LossPlan(label_smoothing=smoothing, tile=4))(*leaves[:3])
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, **TOLERANCE)
    for leaf, each in zip(leaves[:3], reference, strict=False):
        torch.testing.assert_close(leaf.grad, each.grad, **TOLERANCE)


@pytest.mark.parametrize("tile", [2, 100])
def test_statistics_are_those_of_this_ranks_samples(tile):
    images, texts, *ids = batch(8, 0)
    scale = torch.tensor(7.0, dtype=torch.float64)
    logits = scale * images @ texts.T
    same = matches(*(each.tolist() for each in ids))
    output = ContrastiveLoss(LossPlan(tile=tile))(images, texts, scale, None, PairIds(*ids))
    assert output.candidates == 8
    correct = []
    for statistics, seen in ((output.image_to_text, logits), (output.text_to_image, logits.T)):
        positive = torch.where(same, seen, 0).sum(1) / same.sum(1)
        torch.testing.assert_close(statistics.positive_logit, positive)
        torch.testing.assert_close(statistics.log_sum_exp, seen.logsumexp(1))
        torch.testing.assert_close(statistics.loss, seen.logsumexp(1) - positive)
        best_is_right = same[torch.arange(8), seen.argmax(1)]
        assert statistics.correct.tolist() == best_is_right.tolist()
        correct += best_is_right.tolist()
    assert 0 < sum(correct) < 16
    torch.testing.assert_close(output.accuracy.item(), sum(correct) / 16)


def test_statistics_of_a_small_batch_do_not_depend_on_the_way_it_is_computed():
    images, texts, *_ = batch(8, 0)
    scale = torch.tensor(7.0, dtype=torch.float64)
    whole = ContrastiveLoss()(images, texts, scale)
    tiled = ContrastiveLoss(LossPlan(keep_logits=False, tile=3))(images, texts, scale)
    for side in ("image_to_text", "text_to_image"):
        for found, expected in zip(getattr(whole, side), getattr(tiled, side), strict=True):
            torch.testing.assert_close(found, expected)
    assert torch.equal(whole.correct, tiled.correct)
    torch.testing.assert_close(whole.loss, tiled.loss)


@pytest.mark.parametrize(
    ("scored", "skipped"), [((7, 5), 0), ((4, 2), 2), ((0, 5), 0), ((7, 0), 0)]
)
def test_tiles_cover_what_is_scored_once_and_skip_what_is_not(scored, skipped):
    seen = torch.zeros(7, 5)
    for tile in tiles((7, 5), scored, (3, 2)):
        seen[tile.rows, tile.columns] += 1
        assert tile.rows_scored == (tile.rows.stop <= scored[0])
        assert tile.columns_scored == (tile.columns.stop <= scored[1])
    expected = torch.ones(7, 5)
    expected[scored[0] :, scored[1] :] = 0
    assert torch.equal(seen, expected)


def test_own_pairs_are_found_in_whatever_tile_they_lie():
    own = OwnPairs(rows=slice(2, 6), columns=slice(5, 9))
    values = torch.zeros(8, 11)
    for tile in tiles((8, 11), (8, 11), (3, 4)):
        pairs, rows, columns = own.diagonal(values[tile.rows, tile.columns], tile)
        pairs += 1
        assert rows.stop - rows.start == columns.stop - columns.start == len(pairs)
    expected = torch.zeros(8, 11)
    expected[range(2, 6), range(5, 9)] = 1
    assert torch.equal(values, expected)


def test_missing_captions_do_not_match_each_other():
    ids = torch.tensor([[0, 10, NO_CAPTION, 7], [1, 11, NO_CAPTION, NO_CAPTION], [2, 12, 7, 8]])
    everything = Tile(slice(0, 3), slice(0, 3), rows_scored=True, columns_scored=True)
    positive, ignored = SharedIds(ids, ids, "positive").masks(everything)
    assert positive.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    assert ignored is None
    positive, ignored = SharedIds(ids, ids, "ignore").masks(everything)
    assert torch.equal(positive, torch.eye(3, dtype=torch.bool))
    assert ignored.tolist() == [[False, False, True], [False] * 3, [True, False, False]]
