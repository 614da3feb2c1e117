"""The loss on real processes against its definition on one, for every way to lay it out.

The numbers in the tests' docstrings are those of the identities in docs/grouped_loss.md.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.support.dense_loss import sigmoid_definition, softmax_definition
from tests.support.processes import run_in_processes
from vlm.losses.contrastive import ContrastiveLoss
from vlm.losses.plan import LossPlan

LOCAL, WIDTH, DIM = 3, 5, 4
WORLDS = [1, 2, 3, 4, 6]
TILES = [1, 5, 1000]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


class Towers(nn.Module):
    """The smallest dual encoder: a matrix a tower, a temperature and a bias."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        image, text = torch.randn(2, WIDTH, DIM, generator=generator, dtype=torch.float64)
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, images, texts):
        return (
            F.normalize(images @ self.image, dim=-1),
            F.normalize(texts @ self.text, dim=-1),
            self.log_scale.exp(),
            self.bias * 1,
        )


def global_inputs(samples, step=0):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2, samples, WIDTH, generator=generator, dtype=torch.float64)


def divisors(number):
    return [k for k in range(1, number + 1) if number % k == 0]


def layouts(world):
    """Every group size, every mesh of it, and both groupings."""
    return [
        {"group_size": size, "mesh": (rows, size // rows), "grouping": grouping}
        for size in divisors(world)
        for rows in divisors(size)
        for grouping in ("contiguous", "strided")
        if grouping == "contiguous" or 1 < size < world
    ]


def group_rows(world, layout):
    """The global rows of each group's samples."""
    size, groups = layout["group_size"], world // layout["group_size"]
    members = [
        range(k, world, groups)
        if layout["grouping"] == "strided"
        else range(k * size, (k + 1) * size)
        for k in range(groups)
    ]
    return [
        torch.cat([torch.arange(rank * LOCAL, (rank + 1) * LOCAL) for rank in ranks])
        for ranks in members
    ]


def reference(world, kind, layout):
    """Loss and gradients of the towers' parameters on one process."""
    towers = Towers()
    images, texts, scale, bias = towers(*global_inputs(world * LOCAL))
    losses = [
        softmax_definition(images[rows], texts[rows], scale)
        if kind == "softmax"
        else sigmoid_definition(images[rows], texts[rows], scale, bias)
        for rows in group_rows(world, layout)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), gradients_of(towers)


def gradients_of(module):
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


def averaged(tensors):
    """Average over ranks, as DDP does."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
    return tensors


def _largest_errors(rank, world):
    """Run the whole grid of one world; return each case's largest relative error."""
    own = slice(rank * LOCAL, (rank + 1) * LOCAL)
    inputs = [each[own] for each in global_inputs(world * LOCAL)]
    errors = {}
    for layout, kind in itertools.product(layouts(world), ("softmax", "sigmoid")):
        loss, gradients = reference(world, kind, layout)
        for tile, keep in itertools.product(TILES, (True, False)):
            towers = Towers()
            images, texts, scale, bias = towers(*inputs)
            plan = LossPlan(kind=kind, tile=tile, keep_logits=keep, **layout)
            output = ContrastiveLoss(plan)(
                images, texts, scale, bias if kind == "sigmoid" else None
            )
            output.loss.backward()
            (found,) = averaged([output.loss.detach().clone()])
            differences = [abs(found.item() - loss)]
            for gradient, expected in zip(averaged(gradients_of(towers)), gradients, strict=True):
                scale_of = expected.norm().clamp(min=1)
                differences.append(((gradient - expected).norm() / scale_of).item())
            errors[f"{layout} {kind} tile {tile} keep {keep}"] = max(differences)
    return errors


@pytest.mark.distributed
@pytest.mark.parametrize("world", WORLDS)
def test_every_layout_gives_the_loss_and_the_averaged_gradients_of_one_process(world):
    """Identities 1 to 4 and 17."""
    results = (
        [_largest_errors(0, 1)] if world == 1 else run_in_processes(_largest_errors, world, world)
    )
    for errors in results:
        wrong = {case: error for case, error in errors.items() if not error <= 1e-12}
        assert not wrong
    assert len(results[0]) == len(layouts(world)) * 2 * len(TILES) * 2
