"""Extreme logits, narrow types, autocast, and what autograd may ask."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.dense_loss import sigmoid_definition, softmax_definition
from tests.support.processes import run_in_world
from vlm.losses.contrastive import ContrastiveLoss, PairIds
from vlm.losses.kernels import exp_sums_, sigmoid_sums_, softmax_weights
from vlm.losses.plan import LossPlan


def features(samples, dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        F.normalize(torch.randn(samples, dim, generator=generator), dim=1).to(dtype)
        for _ in range(2)
    ]


def opposite_and_equal():
    """Images and texts with cosines of -1, 0.05 and 1."""
    axes = torch.eye(4)
    tilted = 0.05 * axes[0] + (1 - 0.05**2) ** 0.5 * axes[1]
    images = torch.stack([axes[0], -axes[0], tilted, axes[0]])
    texts = torch.stack([axes[0], axes[0], axes[0], -axes[0]])
    return images, texts


@pytest.mark.parametrize("tile", [1, 2, 1000])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_large_scales_and_any_cosine_are_finite_and_right_in_float32(kind, tile, scale):
    """Identity 10: without a running maximum exp(89) is infinite, with a fixed one rows vanish."""
    images, texts = (each.requires_grad_() for each in opposite_and_equal())
    doubles = [each.detach().double().requires_grad_() for each in (images, texts)]
    bias = torch.tensor(-10.0) if kind == "sigmoid" else None
    output = ContrastiveLoss(LossPlan(kind=kind, tile=tile))(
        images, texts, torch.tensor(scale), bias
    )
    output.loss.backward()
    if bias is None:
        expected = softmax_definition(*doubles, scale)
    else:
        expected = sigmoid_definition(*doubles, scale, -10.0)
    expected.backward()
    torch.testing.assert_close(output.loss.double(), expected)
    for each, double in zip((images, texts), doubles, strict=True):
        torch.testing.assert_close(each.grad.double(), double.grad, rtol=1e-5, atol=1e-5)


def test_one_row_far_below_the_others_keeps_its_digits():
    """A shared offset would let the row's exponentials vanish."""
    images, texts = features(64, 8)
    images[5] *= 1e-3
    texts[5] = -texts[:5].sum(0)
    exact = softmax_definition(images.double(), texts.double(), 300.0)
    found = ContrastiveLoss(LossPlan(tile=16))(images, texts, torch.tensor(300.0)).loss
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_without_a_scale_the_loss_is_the_logarithm_of_the_candidates():
    """Identity 10."""
    images, texts = features(37, 8)
    output = ContrastiveLoss(LossPlan(tile=10))(images, texts, torch.tensor(0.0))
    torch.testing.assert_close(output.loss, torch.tensor(37.0).log())


def test_the_scale_has_a_gradient_even_where_it_is_zero():
    leaves = [*features(9, 4, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    found, expected = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    ContrastiveLoss(LossPlan(tile=4))(*found).loss.backward()
    softmax_definition(*expected).backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def bfloat16_errors(images, texts, total, own, tile, mesh="auto", wire_dtype=None):
    """Relative errors of the gradients against float64 on the same rounded features."""
    leaves = [each[own].clone().requires_grad_() for each in (images, texts)]
    plan = LossPlan(tile=tile, mesh=mesh, wire_dtype=wire_dtype)
    scale = torch.tensor(20.0, requires_grad=True)
    ContrastiveLoss(plan)(*leaves, scale).loss.backward()
    doubles = [each.bfloat16().double().requires_grad_() for each in (images, texts)]
    softmax_definition(*doubles, 20.0).backward()
    return [
        relative_error(leaf.grad / total, double.grad[own])
        for leaf, double in zip(leaves, doubles, strict=True)
    ]


def _rank_errors(rank, world, wire_dtype):
    dtype = torch.bfloat16 if wire_dtype is None else torch.float32
    images, texts = (each.bfloat16().to(dtype) for each in features(48, 32))
    own = slice(rank * 48 // world, (rank + 1) * 48 // world)
    return bfloat16_errors(images, texts, world, own, 5, wire_dtype=wire_dtype)


@pytest.mark.slow
@pytest.mark.distributed
def test_errors_of_bfloat16_features_do_not_grow_with_ranks_or_tiles():
    """Identity 11: the only roundings are of the features and of their finished gradients."""
    images, texts = features(48, 32, dtype=torch.bfloat16)
    for tile in (1, 5, 1000):
        assert max(bfloat16_errors(images, texts, 1, slice(48), tile)) < 2**-8
    for world in (2, 6):
        errors = run_in_world(_rank_errors, world, world, None)
        assert max(max(each) for each in errors) < 2**-8
    # In float32 the gradients are not rounded even at the end.
    errors = run_in_world(_rank_errors, 4, 4, "bfloat16")
    assert max(max(each) for each in errors) < 1e-6


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_autocast_leaves_the_loss_in_float32(kind):
    """Identity 16."""
    for samples in (300, 600):  # the plain way and tiles
        images, texts = (each.requires_grad_() for each in features(samples, 16))
        bias = torch.tensor(-3.0) if kind == "sigmoid" else None
        loss = ContrastiveLoss(LossPlan(kind=kind))
        expected = loss(images, texts, torch.tensor(50.0), bias).loss
        (wanted,) = torch.autograd.grad(expected, images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(images, texts, torch.tensor(50.0), bias).loss
        (gradient,) = torch.autograd.grad(found, images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, wanted)


def test_a_gradient_scaler_finds_its_factor_again():
    """Identity 16."""
    images, texts = (each.requires_grad_() for each in features(20, 8))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss = ContrastiveLoss(LossPlan(tile=7))(images, texts, torch.tensor(9.0)).loss
    (expected,) = torch.autograd.grad(loss, images, retain_graph=True)
    scaler.scale(loss).backward()
    optimizer = torch.optim.SGD([images], lr=0.1)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(images.grad, expected)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("keep", [True, False])
def test_gradients_are_those_of_finite_differences(kind, keep):
    """Identity 16; ids keep the small batch from the plain way."""
    loss = ContrastiveLoss(LossPlan(kind=kind, tile=2, keep_logits=keep, duplicates="ignore"))
    leaves = [*features(4, 4, dtype=torch.float64), torch.tensor(2.0).double()]
    if kind == "sigmoid":
        leaves.append(torch.tensor(-1.0).double())
    for leaf in leaves:
        leaf.requires_grad_()
    ids = PairIds(torch.tensor([0, 1, 2, 1]), torch.arange(4))

    def value(images, texts, scale, bias=None):
        return loss(images, texts, scale, bias, ids).loss

    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_graph_that_is_kept_can_be_differentiated_again(kind):
    images, texts = (each.requires_grad_() for each in features(400, 8))
    bias = torch.tensor(-1.0) if kind == "sigmoid" else None
    loss = ContrastiveLoss(LossPlan(kind=kind, tile=100))(images, texts, torch.tensor(5.0), bias)
    first = torch.autograd.grad(loss.loss, (images, texts), retain_graph=True)
    again = torch.autograd.grad(loss.loss, (images, texts))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_second_derivatives_are_refused(kind):
    """Identity 16."""
    images, texts = (each.requires_grad_() for each in features(5, 8))
    bias = torch.tensor(-1.0) if kind == "sigmoid" else None
    plan = LossPlan(kind=kind, keep_logits=False)
    loss = ContrastiveLoss(plan)(images, texts, torch.tensor(5.0), bias).loss
    with pytest.raises(NotImplementedError, match="expected create_graph=False"):
        torch.autograd.grad(loss, images, create_graph=True)


def kernel_results(device):
    """What the kernels give for tiles whose rows and columns differ little, and much."""
    results = []
    for spread in (1.0, 200.0):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(33, 17, generator=generator)
        logits[3] -= spread
        logits[:, 5] += spread
        row_lse, column_lse = logits.logsumexp(1) + 0.5, logits.logsumexp(0) + 0.5
        row_lse[7] = torch.inf
        row_weight, column_weight = torch.rand(33, generator=generator), torch.rand(17)
        tensors = [logits, row_lse, row_weight, column_lse, torch.ones_like(column_weight)]
        logits, *targets = [each.to(device) for each in tensors]
        results.append(softmax_weights(logits.clone(), None, *targets))
        sums, weights = sigmoid_sums_(logits.clone(), torch.tensor(-2.0, device=device))
        results += [sums.row_sum, sums.column_sum, weights]
        values = logits.clone()
        sums, offset = exp_sums_(values)
        results += [sums.row_max + sums.row_sum.log(), sums.column_max + sums.column_sum.log()]
        results.append(softmax_weights(values, offset, *targets))
    return [each.cpu() for each in results]


def test_kernels_are_right_whether_or_not_one_offset_does_for_all():
    found = kernel_results("cpu")
    generator = torch.Generator().manual_seed(0)
    for spread, results in ((1.0, found[:7]), (200.0, found[7:])):
        generator.manual_seed(0)
        logits = torch.randn(33, 17, generator=generator).double()
        logits[3] -= spread
        logits[:, 5] += spread
        row_lse, column_lse = logits.logsumexp(1) + 0.5, logits.logsumexp(0) + 0.5
        row_lse[7] = torch.inf
        row_weight = torch.rand(33, generator=generator).double()
        weights = (logits - row_lse[:, None]).exp() * row_weight[:, None]
        weights += (logits - column_lse).exp()
        softplus = torch.logaddexp(logits - 2, torch.zeros(()).double())
        expected = [weights, softplus.sum(1), softplus.sum(0), (logits - 2).sigmoid()]
        expected += [logits.logsumexp(1), logits.logsumexp(0)]
        for one, other in zip(results, [*expected, weights], strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=1e-7)


@pytest.mark.gpu
def test_fused_kernels_on_a_gpu_give_what_plain_ones_give_on_a_cpu():
    for one, other in zip(kernel_results("cuda"), kernel_results("cpu"), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_on_a_gpu_is_that_on_a_cpu(kind, dtype):
    results = []
    for device in ("cuda", "cpu"):
        leaves = [*features(700, 64, dtype=dtype), torch.tensor(20.0)]
        if kind == "sigmoid":
            leaves.append(torch.tensor(-10.0))
        leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
        output = ContrastiveLoss(LossPlan(kind=kind, tile=256))(*leaves)
        output.loss.backward()
        results.append([output.loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)])
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-5}
    )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
