"""Terms of several languages against dense definitions, on one process and on four."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.meters import TensorMeter
from tests.support.dense_loss import bilingual_definition, bilingual_terms
from tests.support.processes import run_in_world
from vlm.errors import ConfigError
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.contrastive import ContrastiveLoss, PairIds
from vlm.losses.plan import LossConfig, LossPlan
from vlm.text.caption_ids import NO_CAPTION

LOCAL, DIM = 4, 5
WEIGHTS = {"en": 0.5}


def batch(samples):
    """Features and ids with repeated concepts, repeated captions, and missing languages."""
    generator = torch.Generator().manual_seed(samples)
    images, zh, en = (
        F.normalize(torch.randn(samples, DIM, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(3)
    )
    image_ids = torch.randint(0, samples - 1, (samples,), generator=generator)
    captions = torch.randint(0, 2 * samples, (2, samples), generator=generator)
    captions[:, torch.rand(samples, generator=generator) < 0.1] = NO_CAPTION
    captions[torch.rand(2, samples, generator=generator) < 0.3] = NO_CAPTION
    return images, {"zh": zh, "en": en}, image_ids, dict(zip(("zh", "en"), captions, strict=True))


def definition(features, kind, duplicates, together, pair_weight):
    """The weighted mean of the terms of one group."""
    *features, scale, bias = features
    terms = bilingual_terms(
        *features, together=together, weights=WEIGHTS, pair=("zh", "en"), pair_weight=pair_weight
    )
    return bilingual_definition(terms, kind, duplicates, scale, bias)


def leaves_of(data, rows=slice(None)):
    images, texts, image_ids, captions = data
    scalars = [torch.tensor(value, dtype=torch.float64).requires_grad_() for value in (6.0, -2.0)]
    return (
        images[rows].clone().requires_grad_(),
        {name: text[rows].clone().requires_grad_() for name, text in texts.items()},
        image_ids[rows],
        {name: ids[rows] for name, ids in captions.items()},
        *scalars,
    )


CASES = list(
    itertools.product(("softmax", "sigmoid"), ("positive", "ignore"), (False, True), (0.0, 0.3))
)


def reference(world, groups, case):
    """The loss and its gradients on one process."""
    leaves = leaves_of(batch(LOCAL * world))
    images, texts, ids, captions, scale, bias = leaves
    size = LOCAL * world // groups
    losses = []
    for start in range(0, LOCAL * world, size):
        rows = slice(start, start + size)
        part = (
            images[rows], {name: text[rows] for name, text in texts.items()}, ids[rows],
            {name: c[rows] for name, c in captions.items()}, scale, bias,
        )  # fmt: skip
        losses.append(definition(part, *case))
    loss = torch.stack(losses).mean()
    loss.backward()
    return [loss.detach(), *gradients_of(leaves, case[0])]


def gradients_of(leaves, kind):
    """The gradients by scale, bias and all features; a softmax has no bias."""
    images, texts, _, _, scale, bias = leaves
    of_bias = bias.grad if kind == "sigmoid" else torch.zeros_like(bias)
    return [scale.grad, of_bias, images.grad, *(text.grad for text in texts.values())]


def _results(rank, world, groups, mesh):
    """This rank's loss and gradients in every case."""
    data = batch(LOCAL * world)
    found = []
    for kind, duplicates, together, pair_weight in CASES:
        leaves = leaves_of(data, slice(rank * LOCAL, (rank + 1) * LOCAL))
        images, texts, ids, captions, scale, bias = leaves
        loss_function = BilingualLoss(
            LossPlan(
                kind=kind, duplicates=duplicates, tile=3, group_size=world // groups, mesh=mesh
            ),
            weights=WEIGHTS,
            together=together,
            text_pair=("zh", "en") if pair_weight else None,
            text_pair_weight=pair_weight,
        )
        output = loss_function(
            images, loss_function.send_texts(texts), scale, ids, captions,
            bias if kind == "sigmoid" else None,
        )  # fmt: skip
        output.loss.backward()
        found.append([output.loss.detach(), *gradients_of(leaves, kind)])
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "groups", "mesh"),
    [
        (1, 1, "auto"),
        (4, 1, (2, 2)),
        (4, 2, (2, 1)),
        pytest.param(6, 1, (2, 3), marks=pytest.mark.slow),
    ],
)
def test_every_combination_of_terms_is_its_definition(world, groups, mesh):
    arguments = (world, groups, mesh)
    results = [_results(0, *arguments)] if world == 1 else run_in_world(_results, world, *arguments)
    wrong = []
    for case, *of_ranks in zip(CASES, *results, strict=True):
        *scalars, images, zh, en = zip(*of_ranks, strict=True)
        # The mean over ranks of the losses, so that a rank has a share of each gradient.
        found = [torch.stack(each).mean(0) for each in scalars]
        found += [torch.cat(each) / world for each in (images, zh, en)]
        pairs = zip(found, reference(world, groups, case), strict=True)
        errors = [(one - other).abs().max() for one, other in pairs]
        if not all(error <= 1e-11 for error in errors):
            wrong.append((case, errors))
    assert not wrong


def test_terms_have_names_and_statistics_of_the_samples_that_have_a_caption():
    data = leaves_of(batch(8))
    images, texts, ids, captions, scale, _ = data
    loss = BilingualLoss(text_pair=("zh", "en"))
    terms = loss(images, loss.send_texts(texts), scale, ids, captions).terms
    assert list(terms) == ["image-zh", "image-en", "zh-en"]
    for name in ("zh", "en"):
        present = int((captions[name] != NO_CAPTION).sum())
        assert 0 < present < 8
        assert terms[f"image-{name}"].candidates == present
        assert len(terms[f"image-{name}"].image_to_text.loss) == present
    together = BilingualLoss(together=True)
    terms = together(images, together.send_texts(texts), scale, ids, captions).terms
    assert list(terms) == ["image-text"]


def test_one_language_is_the_contrastive_loss_with_ids():
    images, texts, ids, captions, scale, _ = leaves_of(batch(8))
    loss = BilingualLoss()
    sent = loss.send_texts({"zh": texts["zh"]})
    found = loss(images, sent, scale, ids, {"zh": captions["zh"]})
    expected = ContrastiveLoss()(images, texts["zh"], scale, None, PairIds(ids, captions["zh"]))
    torch.testing.assert_close(found.loss, expected.loss)


def test_one_language_without_duplicates_is_the_loss_of_open_clip():
    from open_clip import ClipLoss

    images, text = (F.normalize(torch.randn(6, DIM), dim=-1).requires_grad_() for _ in range(2))
    ids, scale = torch.arange(6), torch.tensor(20.0)
    loss = BilingualLoss()
    found = loss(images, loss.send_texts({"en": text}), scale, ids, {"en": ids}).loss
    expected = ClipLoss()(images, text, scale)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, images)
    (wanted,) = torch.autograd.grad(expected, images)
    torch.testing.assert_close(gradient, wanted)


def _counted(rank):
    images, texts, ids, captions, scale, _ = leaves_of(batch(8), slice(4 * rank, 4 * rank + 4))
    loss = BilingualLoss(LossPlan(mesh="image"))
    with TensorMeter() as meter:
        sent = loss.send_texts(texts)
        loss(images, sent, scale, ids, captions).loss.backward()
    return meter.collectives


@pytest.mark.distributed
def test_images_travel_once_for_all_languages():
    for collectives in run_in_world(_counted, 2):
        assert collectives == {
            # What each brings of texts and of images, images, ids, and one merge a language.
            "_allgather_base_": 6,
            "_reduce_scatter_base_": 1,
        }


def test_the_languages_of_the_text_text_term_must_be_there():
    texts = {"zh": torch.randn(8, DIM)}
    loss = BilingualLoss(text_pair=("zh", "en"))
    message = "there are captions in zh; expected en as well for the text-text term"
    with pytest.raises(ConfigError, match=message):
        loss.send_texts(texts)


def test_captions_may_come_in_another_order_than_their_ids():
    images, texts, ids, captions, scale, _ = leaves_of(batch(8))
    loss, reordered = BilingualLoss(), dict(reversed(captions.items()))
    found, expected = (
        loss(images, loss.send_texts(texts), scale, ids, each).loss
        for each in (reordered, captions)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["second_weight", "text_text_weight", "micro_batches"])
def test_negative_weights_and_numbers_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is -1"):
        LossConfig(**{name: -1 if name == "micro_batches" else -1.0})


class Tower(torch.autograd.Function):
    """Notes when it runs, forward and backward."""

    @staticmethod
    def forward(ctx, features, name, events):
        ctx.name, ctx.events = name, events
        events.append(f"{name} forward")
        return features * 1

    @staticmethod
    def backward(ctx, gradient):
        ctx.events.append(f"{ctx.name} backward")
        return gradient, None, None


class Collectives(TorchDispatchMode):
    """Notes the large collectives as they are posted."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and args[0].ndim == 2 and args[0].dtype == torch.float64:
            self.events.append(func.__name__.split(".")[0].strip("_"))
        return func(*args, **(kwargs or {}))


def _events(rank):
    images, texts, ids, captions, scale, _ = leaves_of(batch(16), slice(4 * rank, 4 * rank + 4))
    loss, events = BilingualLoss(LossPlan(mesh=(2, 2))), []
    with Collectives(events):
        sent = loss.send_texts({"zh": Tower.apply(texts["zh"], "text", events)})
        image = Tower.apply(images, "image", events)
        loss(image, sent, scale, ids, {"zh": captions["zh"]}).loss.backward()
    return events


@pytest.mark.distributed
def test_texts_travel_behind_the_image_tower_and_their_gradients_behind_its_backward_pass():
    for events in run_in_world(_events, 4):
        assert events == [
            "text forward", "allgather_base", "image forward", "allgather_base",
            "reduce_scatter_base", "reduce_scatter_base", "image backward", "text backward",
        ]  # fmt: skip
