"""Distances to a teacher against their definitions, row by row, on one rank and on several."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import run_in_world
from vlm.distributed.groups import SINGLE, world_group
from vlm.losses.distillation import (
    Side,
    feature_distance,
    logit_divergence,
    structure_divergence,
)

LOCAL, DIM = 4, 3
THERE = {"image": [True] * 8, "en": [True, False, True, True, True, True, False, True]} | {
    "zh": [False, False, True, False, False, False, True, True],
    "none": [False] * 8,
}
NAMES = ("en", "zh", "none")


def unit(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, DIM, generator=generator, dtype=torch.float64)
    return vectors / vectors.norm(dim=1, keepdim=True)


def sides(rows=2 * LOCAL, own=slice(None)):
    """Both models' images and captions in three languages; no sample has a caption in the last."""
    found = {}
    for seed, (name, there) in enumerate(THERE.items()):
        present = torch.tensor(there[:rows])
        features = [unit(rows, 2 * seed + k) * present[:, None] for k in (0, 1)]
        found[name] = Side(features[0][own].requires_grad_(), features[1][own], present[own])
    return found


def scale():
    return torch.tensor(3.0, dtype=torch.float64, requires_grad=True)


TEACHER_SCALE = torch.tensor(5.0, dtype=torch.float64)


def losses(found, own_scale, group):
    images, texts = found["image"], [found[name] for name in NAMES]
    return {
        "features": feature_distance([images, *texts], group),
        "structure": structure_divergence([images, *texts], TEACHER_SCALE, group),
        "logits": logit_divergence(images, texts, own_scale, TEACHER_SCALE, group),
    }


def mean_of_sides(rows_of_sides):
    means = [sum(rows) / len(rows) for rows in rows_of_sides if rows]
    return sum(means) / len(means)


def divergence(own, target):
    """KL(target || own) of two lists of logits, by the definition."""
    if not own:
        return 0.0
    p, q = (
        [each.exp() / sum(other.exp() for other in logits) for each in logits]
        for logits in (target, own)
    )
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


def definition(found, own_scale):
    rows = {
        name: [k for k, there in enumerate(side.there) if there] for name, side in found.items()
    }
    features = [
        [sum((side.own[k] - side.target[k]) ** 2) for k in rows[name]]
        for name, side in found.items()
    ]
    structure = [
        [
            divergence(
                [TEACHER_SCALE * side.own[i] @ side.own[j] for j in rows[name] if j != i],
                [TEACHER_SCALE * side.target[i] @ side.target[j] for j in rows[name] if j != i],
            )
            for i in rows[name]
        ]
        for name, side in found.items()
    ]
    logits = []
    for name in NAMES:
        for first, second in itertools.permutations((found["image"], found[name])):
            logits.append(
                [
                    divergence(
                        [own_scale * first.own[i] @ second.own[j] for j in rows[name]],
                        [TEACHER_SCALE * first.target[i] @ second.target[j] for j in rows[name]],
                    )
                    for i in rows[name]
                ]
            )
    parts = {"features": features, "structure": structure, "logits": logits}
    return {name: mean_of_sides(rows) for name, rows in parts.items()}


def differentiated(loss, found, own_scale):
    """The gradients of a loss by all features and by the scale; zeros where it has none."""
    leaves = [side.own for side in found.values()] + [own_scale]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)
    pairs = zip(gradients, leaves, strict=True)
    return [torch.zeros_like(leaf) if each is None else each for each, leaf in pairs]


@pytest.mark.parametrize("name", ["features", "structure", "logits"])
def test_one_rank_agrees_with_the_definition(name):
    found, own_scale = sides(), scale()
    loss, expected = losses(found, own_scale, SINGLE)[name], definition(found, own_scale)[name]
    torch.testing.assert_close(loss, expected)
    assert loss > 0.01
    torch.testing.assert_close(
        differentiated(loss, found, own_scale), differentiated(expected, found, own_scale)
    )


def _on_a_rank(rank, world):
    """This rank's shares of the losses, and their gradients by its own features."""
    rows = 2 * LOCAL // world
    found, own_scale = sides(own=slice(rank * rows, (rank + 1) * rows)), scale()
    shares = losses(found, own_scale, world_group())
    results = []
    for share in shares.values():
        gradients = differentiated(share, found, own_scale)
        total = torch.stack([share.detach(), gradients[-1]])
        dist.all_reduce(total)
        results.append([total / world, [each / world for each in gradients[:-1]]])
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_of_the_ranks_shares_is_the_loss_of_all_and_so_are_its_gradients(world):
    whole, own_scale = sides(), scale()
    expected = losses(whole, own_scale, SINGLE)
    for rank, results in enumerate(run_in_world(_on_a_rank, world, world)):
        rows = slice(rank * 2 * LOCAL // world, (rank + 1) * 2 * LOCAL // world)
        for (total, gradients), loss in zip(results, expected.values(), strict=True):
            *own, by_scale = differentiated(loss, whole, own_scale)
            torch.testing.assert_close(total, torch.stack([loss.detach(), by_scale]))
            torch.testing.assert_close(gradients, [each[rows] for each in own])


def test_a_model_that_is_its_teacher_has_no_distance_and_no_gradient():
    found = {name: Side(side.target.clone().requires_grad_(), *side[1:])
             for name, side in sides().items()}  # fmt: skip
    own_scale = TEACHER_SCALE.clone().requires_grad_()
    for name, loss in losses(found, own_scale, SINGLE).items():
        assert abs(loss) < 1e-12, name
        gradients = differentiated(loss, found, own_scale)
        assert all(each.abs().max() < 1e-12 for each in gradients), name


def test_a_batch_without_any_target_has_a_loss_of_zero_and_not_of_nothing():
    empty = sides()["none"]
    loss = feature_distance([empty], SINGLE) + structure_divergence([empty], TEACHER_SCALE, SINGLE)
    loss.backward()
    assert loss == 0
    assert not empty.own.grad.any()
    assert logit_divergence(empty, [empty], scale(), TEACHER_SCALE, SINGLE).detach() == 0


def test_features_of_absent_captions_change_nothing():
    found, own_scale = sides(), scale()
    before = losses(found, own_scale, SINGLE)
    absent = ~found["zh"].there
    own = torch.where(absent[:, None], unit(8, 99), found["zh"].own)
    after = losses(found | {"zh": found["zh"]._replace(own=own)}, own_scale, SINGLE)
    torch.testing.assert_close(after, before)
