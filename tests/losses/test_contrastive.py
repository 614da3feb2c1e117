import math

import pytest
import torch
import torch.nn.functional as F

from vlm.losses.contrastive import multi_positive_cross_entropy, positive_pairs
from vlm.text.caption_ids import NO_CAPTION


def naive_row_loss(logits, positives, candidates):
    """The definition, one number at a time."""
    losses = []
    for i in range(len(logits)):
        columns = [j for j in range(logits.shape[1]) if candidates[j]]
        right = [j for j in columns if positives[i, j]]
        total = sum(math.exp(logits[i, j]) for j in columns)
        parts = [-math.log(math.exp(logits[i, j]) / total) for j in right]
        losses.append(sum(parts) / len(parts) if parts else 0.0)
    return torch.tensor(losses, dtype=logits.dtype)


def test_one_positive_a_row_is_cross_entropy():
    logits = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    loss = multi_positive_cross_entropy(
        logits, torch.eye(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
    )
    expected = F.cross_entropy(logits, torch.arange(5), reduction="none")
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_several_positives_match_the_definition(seed):
    torch.manual_seed(seed)
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    positives = torch.rand(6, 8) < 0.3
    candidates = torch.rand(8) < 0.7
    candidates[0] = True
    loss = multi_positive_cross_entropy(logits, positives, candidates)
    torch.testing.assert_close(loss, naive_row_loss(logits.detach(), positives, candidates))
    assert torch.autograd.gradcheck(
        lambda z: multi_positive_cross_entropy(z, positives, candidates), logits
    )


def test_a_batch_without_any_candidate_costs_nothing_and_has_no_gradient():
    logits = torch.randn(3, 3, requires_grad=True)
    loss = multi_positive_cross_entropy(
        logits, torch.eye(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    )
    loss.sum().backward()
    assert torch.equal(loss.detach(), torch.zeros(3))
    assert torch.equal(logits.grad, torch.zeros(3, 3))


def test_the_largest_scale_stays_finite_and_right_in_float32():
    cosines = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    everything = torch.ones(2, dtype=torch.bool)
    right = multi_positive_cross_entropy(100 * cosines, torch.eye(2) > 0, everything)
    wrong = multi_positive_cross_entropy(100 * cosines, torch.eye(2) < 1, everything)
    torch.testing.assert_close(right, torch.zeros(2))
    torch.testing.assert_close(wrong, torch.full((2,), 200.0))


def test_pairs_match_by_concept_or_by_caption_but_never_by_a_missing_caption():
    image_ids = torch.tensor([7, 8, 7, 9])
    caption_ids = torch.tensor([1, 2, NO_CAPTION, 2])
    more_image_ids = torch.tensor([5, 6])
    more_caption_ids = torch.tensor([2, NO_CAPTION])
    expected = torch.tensor(
        [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.bool
    )
    assert torch.equal(positive_pairs(image_ids, caption_ids, image_ids, caption_ids), expected)
    assert positive_pairs(image_ids, caption_ids, more_image_ids, more_caption_ids).tolist() == [
        [False, False], [True, False], [False, False], [True, False],
    ]  # fmt: skip
