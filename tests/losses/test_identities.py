"""The loss on real processes against its definition on one, for every way to lay it out.

The numbers in the tests' docstrings are those of the identities in docs/grouped_loss.md.
"""

import itertools
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.meters import TensorMeter
from tests.support.dense_loss import sigmoid_definition, softmax_definition
from tests.support.processes import run_in_world
from tests.support.vectors import batch_of_vectors, image_vectors, rows_of, text_vectors
from vlm.distributed.mesh import build_mesh
from vlm.losses.axis import AxisLayout, AxisStatistics
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.contrastive import ContrastiveLoss
from vlm.losses.plan import LossPlan
from vlm.models.encoder import MAIN
from vlm.models.pretraining import Encoded, Features
from vlm.training.step import ContrastiveStep

LOCAL, WIDTH, DIM = 3, 5, 4
VARIANTS = [
    # In one batch, where each pair matches itself alone, and in micro-batches, where ids tell. How
    # these are cut is nothing to the loss, which sees all of them joined, kept logits or not.
    (tile, keep, sizes)
    for tile, keep in itertools.product((1, 5, 1000), (True, False))
    for sizes in ((3,), (2, 1) if keep else (1, 1, 1))
]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def slow(*worlds):
    return [pytest.param(world, marks=pytest.mark.slow) for world in worlds]


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
            tensor.div_(dist.get_world_size())
    return tensors


def in_one_batch(towers, inputs, plan):
    """Loss and backward pass of the plain step; every pair matches itself alone."""
    images, texts, scale, bias = towers(*inputs)
    output = ContrastiveLoss(plan)(images, texts, scale, bias if plan.kind == "sigmoid" else None)
    output.loss.backward()
    return output.loss.detach()


class EncodingTowers(nn.Module):
    """The same as a step calls a model."""

    def __init__(self, towers, kind):
        super().__init__()
        self.towers, self.kind = towers, kind

    def forward(self, images, texts, hidden=None, on_texts=None):
        image, text, scale, bias = self.towers(image_vectors(images), text_vectors(texts["en"]))
        own_bias = bias if self.kind == "sigmoid" else None
        return Encoded({MAIN: Features(image, {"en": text}, scale, own_bias)}, {})


def in_micro_batches(towers, inputs, plan, sizes, rank):
    """The same by micro-batches, where ids tell which pairs match."""
    ids = rank * LOCAL + torch.arange(LOCAL)
    images, texts = inputs
    batch = batch_of_vectors(images, {"en": texts}, ids, {"en": ids})
    parts = [rows_of(batch, rows) for rows in torch.arange(LOCAL).split(sizes)]
    return ContrastiveStep(EncodingTowers(towers, plan.kind), BilingualLoss(plan))(parts).loss


def cases(world):
    return itertools.product(layouts(world), ("softmax", "sigmoid"))


def _losses_and_gradients(rank, world):
    """Run the whole grid of one world; return a row a case: the loss, and then the gradients."""
    own = slice(rank * LOCAL, (rank + 1) * LOCAL)
    inputs = [each[own] for each in global_inputs(world * LOCAL)]
    rows = []
    for (layout, kind), (tile, keep, sizes) in itertools.product(cases(world), VARIANTS):
        towers = Towers()
        plan = LossPlan(kind=kind, tile=tile, keep_logits=keep, **layout)
        if len(sizes) == 1:
            loss = in_one_batch(towers, inputs, plan)
        else:
            loss = in_micro_batches(towers, inputs, plan, sizes, rank)
        rows.append(torch.cat([each.flatten() for each in (loss, *gradients_of(towers))]))
    return torch.stack(rows)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2, *slow(3, 4, 6)])
def test_every_layout_gives_the_loss_and_the_averaged_gradients_of_one_process(world):
    """Identities 1 to 4, 7 and 17."""
    of_ranks = (
        [_losses_and_gradients(0, 1)]
        if world == 1
        else run_in_world(_losses_and_gradients, world, world)
    )
    rows = torch.stack(of_ranks).mean(0)  # as DDP averages
    assert len(rows) == len(layouts(world)) * 2 * len(VARIANTS)
    wrong, rows = [], iter(rows)
    for layout, kind in cases(world):
        loss, gradients = reference(world, kind, layout)
        for variant, (found, *numbers) in zip(VARIANTS, rows, strict=False):
            errors = [(found - loss).abs()]
            parts = torch.stack(numbers).split([each.numel() for each in gradients])
            for gradient, expected in zip(parts, gradients, strict=True):
                scale_of = expected.norm().clamp(min=1)
                errors.append((gradient - expected.flatten()).norm() / scale_of)
            if not all(error <= 1e-12 for error in errors):
                wrong.append((layout, kind, variant, errors))
    assert not wrong


STEPS = 3


def train(world, step_loss, module, parameters):
    """Three steps of SGD with momentum and clipping; return the losses and the parameters."""
    optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = step_loss(module, step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        (value,) = averaged([loss.detach().clone()])
        losses.append(value.item())
    return [losses, [parameter.detach() for parameter in parameters]]


def _train_on_this_rank(rank, world, kind, layout):
    loss = ContrastiveLoss(LossPlan(kind=kind, tile=4, **layout))
    own = slice(rank * LOCAL, (rank + 1) * LOCAL)

    def step_loss(towers, step):
        images, texts, scale, bias = towers(*(x[own] for x in global_inputs(world * LOCAL, step)))
        return loss(images, texts, scale, bias if kind == "sigmoid" else None).loss

    towers = Towers()
    wrapped = nn.parallel.DistributedDataParallel(towers, find_unused_parameters=True)
    return train(world, step_loss, wrapped, list(towers.parameters()))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("world", "size", "mesh", "grouping"),
    [
        (2, 2, (2, 1), "contiguous"),
        (3, 3, (1, 3), "contiguous"),
        (4, 4, (2, 2), "contiguous"),
        (4, 2, (2, 1), "strided"),
        (4, 1, (1, 1), "contiguous"),
        (6, 6, (2, 3), "contiguous"),
        (6, 3, (3, 1), "strided"),
    ],
)
def test_steps_of_clipped_sgd_on_all_ranks_are_those_of_one_process(
    kind, world, size, mesh, grouping
):
    """Identity 5; Adam would hide a gradient that is off by a factor."""
    layout = {"group_size": size, "mesh": mesh, "grouping": grouping}

    def step_loss(towers, step):
        images, texts, scale, bias = towers(*global_inputs(world * LOCAL, step))
        groups = group_rows(world, layout)
        if kind == "softmax":
            losses = [softmax_definition(images[r], texts[r], scale) for r in groups]
        else:
            losses = [sigmoid_definition(images[r], texts[r], scale, bias) for r in groups]
        return torch.stack(losses).mean()

    towers = Towers()
    losses, parameters = train(world, step_loss, towers, list(towers.parameters()))
    results = run_in_world(_train_on_this_rank, world, world, kind, layout)
    for found_losses, found in results:
        torch.testing.assert_close(found_losses, losses, **TOLERANCE)
        for tensor, expected in zip(found, parameters, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-11, atol=1e-12)


def unit_features(rank, world):
    towers = Towers()
    own = slice(rank * LOCAL, (rank + 1) * LOCAL)
    images, texts, scale, _ = towers(*(x[own] for x in global_inputs(world * LOCAL)))
    return [leaf.detach().requires_grad_() for leaf in (images, texts, scale)]


def _swapped(rank, world):
    found = []
    for mesh, swap in (((2, 3), False), ((3, 2), True)):
        images, texts, scale = unit_features(rank, world)
        sides = (texts, images) if swap else (images, texts)
        output = ContrastiveLoss(LossPlan(mesh=mesh, tile=2))(*sides, scale)
        output.loss.backward()
        found.append([output.loss.detach(), images.grad, texts.grad, scale.grad])
    return found


@pytest.mark.distributed
def test_swapping_images_and_texts_on_the_transposed_mesh_swaps_the_gradients():
    """Identity 6."""
    for straight, swapped in run_in_world(_swapped, 6, 6):
        # A rank's share of the scale's gradient is of its block, which is another one now.
        for found, expected in zip(swapped[:3], straight[:3], strict=True):
            torch.testing.assert_close(found, expected, **TOLERANCE)


def _permuted(rank, world, permutation):
    towers = Towers()
    order = permutation[rank * LOCAL : (rank + 1) * LOCAL]
    images, texts, scale, _ = towers(*(x[order] for x in global_inputs(world * LOCAL)))
    images.retain_grad()
    ContrastiveLoss(LossPlan(tile=2))(images, texts, scale).loss.backward()
    return images.grad


@pytest.mark.distributed
def test_permuting_samples_over_ranks_permutes_the_gradients_of_the_exact_loss():
    """Identity 6."""
    world = 4
    identity = torch.arange(world * LOCAL)
    shuffled = torch.randperm(world * LOCAL, generator=torch.Generator().manual_seed(3))
    straight = torch.cat(run_in_world(_permuted, world, world, identity))
    permuted = torch.cat(run_in_world(_permuted, world, world, shuffled))
    torch.testing.assert_close(permuted, straight[shuffled], **TOLERANCE)


def _frozen(rank, world, kind, frozen):
    results = []
    bias = torch.tensor(-2.0, dtype=torch.float64) if kind == "sigmoid" else None
    for freeze in (False, True):
        leaves = dict(zip(("image", "text", "scale"), unit_features(rank, world), strict=True))
        if freeze:
            leaves[frozen] = leaves[frozen].detach()
        loss = ContrastiveLoss(LossPlan(kind=kind, tile=2, keep_logits=False, mesh=(2, 2)))
        with TensorMeter() as meter:
            loss(*leaves.values(), bias).loss.backward()
        gradients = [leaf.grad for name, leaf in leaves.items() if name != frozen]
        results.append([gradients, meter.collectives.get("_reduce_scatter_base_", 0)])
    with torch.no_grad(), TensorMeter() as meter:
        output = loss(*unit_features(rank, world), bias)
    assert not output.loss.requires_grad
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("frozen", "sent"), [("image", 1), ("text", 1), ("scale", 2)])
def test_what_is_frozen_gets_no_gradient_and_sends_none(kind, frozen, sent):
    """Identity 12."""
    for (free, _), (gradients, scattered) in run_in_world(_frozen, 4, 4, kind, frozen):
        assert scattered == sent
        for found, expected in zip(gradients, free, strict=True):
            torch.testing.assert_close(found, expected, **TOLERANCE)


TILE = 128  # a third of the most rows: far less memory than all similarities of one rank's


def _accounts(rank, world):
    accounts = []
    dim = 64
    for layout, rows in itertools.product(layouts(world), (96, 384)):
        generator = torch.Generator().manual_seed(rank)
        images, texts = (
            F.normalize(torch.randn(rows, dim, generator=generator), dim=1).requires_grad_()
            for _ in range(2)
        )
        scale = torch.tensor(10.0, requires_grad=True)
        loss = ContrastiveLoss(LossPlan(tile=TILE, keep_logits=False, **layout))
        with TensorMeter(images, texts) as meter:
            loss(images, texts, scale).loss.backward()
        accounts.append([layout, rows, meter.collectives, meter.bytes_sent, meter.peak])
    return [dim, accounts]


def merge_cost(ranks, rows):
    """Messages and bytes of merging two statistics of each row over some ranks."""
    if ranks == 1:
        return {}, 0
    if ranks <= 4:
        return {"_allgather_base_": 1}, (ranks - 1) * 2 * rows * 4
    return {"allreduce_": 2}, 2 * (ranks - 1) / ranks * 2 * rows * 4


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, *slow(4, 6)])
def test_collectives_bytes_and_memory_are_those_of_the_formulas(world):
    """Identity 13: 2bd(r - 1) + 2bd(c - 1) elements of features, and small vectors."""
    results = [_accounts(0, 1)] if world == 1 else run_in_world(_accounts, world, world)
    for dim, accounts in results:
        for layout, b, collectives, sent, peak in accounts:
            r, c = layout["mesh"]
            expected = Counter()
            features = 0
            for ranks in (r, c):
                messages, size = merge_cost(ranks, ranks * b)
                expected.update(messages)
                features += 2 * b * dim * (ranks - 1) * 4 + size
                if ranks > 1:
                    expected.update({"_allgather_base_": 1, "_reduce_scatter_base_": 1})
            if r * c > 1:
                expected["_allgather_base_"] += 1  # what every rank declares: 28 integers
                features += (r * c - 1) * 28 * 8
            assert collectives == dict(expected)
            assert sent == pytest.approx(features, rel=1e-12)
            # Features and gradients, own and received; then tiles; then vectors.
            formula = 4 * (4 * b * dim + 2 * (r + c) * b * dim + 4 * TILE**2 + 32 * (r + c) * b)
            assert peak <= formula


def _repeated(rank, world):
    found = []
    for _ in range(2):
        leaves = [leaf.detach().float().requires_grad_() for leaf in unit_features(rank, world)]
        output = ContrastiveLoss(LossPlan(tile=2, mesh=(2, 3)))(*leaves)
        output.loss.backward()
        found.append([output.loss.detach(), *(leaf.grad for leaf in leaves)])
    return found


@pytest.mark.distributed
def test_on_a_cpu_the_same_inputs_give_the_same_bits():
    """Identity 14."""
    for first, again in run_in_world(_repeated, 6, 6):
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def _merged(rank, world):
    mesh = build_mesh(None, (world, 1))
    layout = AxisLayout(own=slice(0, 8), scored=8, total=8, candidates=8)
    stats = AxisStatistics(layout, 8, torch.zeros(()), softmax=True)
    logits = 30 * torch.randn(8, 5, generator=torch.Generator().manual_seed(rank))
    stats.add(slice(0, 8), logits.amax(1), (logits - logits.amax(1)[:, None]).exp().sum(1))
    stats.merge(mesh.column)
    return [stats.log_sum_exp, logits]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [3, 6], ids=["few ranks", "many ranks"])
def test_merged_log_sum_exps_are_right_and_equal_to_the_bit_on_every_rank(world):
    """Identity 14."""
    results = run_in_world(_merged, world, world)
    expected = torch.cat([logits for _, logits in results], dim=1).logsumexp(1)
    for found, _ in results:
        assert torch.equal(found, results[0][0])
        torch.testing.assert_close(found, expected)
