"""Micro-batches: K of them against one, with dropout, under DDP, and the biased variant."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.meters import TensorMeter
from tests.support.dense_loss import matches, softmax_definition
from tests.support.processes import run_in_world
from tests.support.vectors import batch_of_vectors, image_vectors, rows_of, text_vectors
from vlm.errors import ConfigError
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.plan import LossPlan
from vlm.models.encoder import MAIN
from vlm.models.pretraining import Encoded, Features
from vlm.training.step import ContrastiveStep

LOCAL, WIDTH, DIM = 6, 5, 4
LANGUAGES = ("zh", "en")


class Model(nn.Module):
    """A dual encoder with dropout, batch norm and a count of what it encodes.

    With `further` it has a second head, and a loss of another kind on both sides together.
    """

    def __init__(self, *, dropout=0.0, batch_norm=False, kind="softmax", further=False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        image, text = torch.randn(2, WIDTH, DIM, generator=generator, dtype=torch.float64)
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        bias = torch.tensor(-2.0, dtype=torch.float64)
        self.bias = nn.Parameter(bias) if kind == "sigmoid" else None
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(DIM, dtype=torch.float64) if batch_norm else nn.Identity()
        self.encoded = {"images": 0, "texts": 0}
        self.second = None
        if further:
            second = torch.randn(2, WIDTH, DIM, generator=generator, dtype=torch.float64)
            self.second = nn.Parameter(second)
            self.second_log_scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, images, texts, hidden=None, on_texts=None):
        self.encoded["images"] += images is not None
        self.encoded["texts"] += bool(texts)
        images = None if images is None else image_vectors(images)
        texts = {name: text_vectors(tokens) for name, tokens in texts.items()}
        text = {name: F.normalize(self.dropout(x) @ self.text, dim=-1) for name, x in texts.items()}
        if on_texts:
            on_texts(MAIN, text)
        image = None
        if images is not None:
            image = F.normalize(self.norm(self.dropout(images) @ self.image), dim=-1)
        bias = None if self.bias is None else self.bias * 1
        heads = {MAIN: Features(image, text, self.log_scale.exp(), bias)}
        if self.second is None:
            return Encoded(heads, {})
        heads["second"] = self.second_head(images, texts, on_texts)
        if images is None or not texts or not torch.is_grad_enabled():
            return Encoded(heads, {})
        distance = self.dropout(images) @ self.image - texts["zh"] @ self.text
        return Encoded(heads, {"distance": distance.square().sum(1).mean()})

    def second_head(self, images, texts, on_texts):
        text = {name: F.normalize(x @ self.second[0], dim=-1) for name, x in texts.items()}
        if on_texts:
            on_texts("second", text)
        image = None if images is None else F.normalize(images @ self.second[1], dim=-1)
        return Features(image, text, self.second_log_scale.exp())


def global_batch(samples, repeated=True):
    generator = torch.Generator().manual_seed(5)
    images, *texts = torch.randn(3, samples, WIDTH, generator=generator, dtype=torch.float64)
    number = samples - 2 if repeated else 10**9
    ids = torch.randint(0, number, (3, samples), generator=generator)
    return batch_of_vectors(
        images, dict(zip(LANGUAGES, texts, strict=True)), ids[0],
        dict(zip(LANGUAGES, ids[1:], strict=True)),
    )  # fmt: skip


def run_step(step, batch, sizes):
    ends = itertools.accumulate(sizes)
    return step([rows_of(batch, slice(e - n, e)) for n, e in zip(sizes, ends, strict=True)])


def gradients_of(model):
    return [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]


def assert_all_close(found, expected, tolerance=1e-12):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def definition(head, batch):
    """The mean of both languages' softmax losses of a head."""
    return sum(
        softmax_definition(
            head.image, head.text[name], head.logit_scale,
            positives=matches(batch.image_ids.tolist(), batch.caption_ids[name].tolist()),
        )
        for name in LANGUAGES
    ) / 2  # fmt: skip


SPLITS = [(6,), (3, 3), (4, 2), (2, 2, 2), (3, 2, 1)]


def _steps_under_ddp(rank, world, kind, plan):
    """Two optimizer steps of each split; returns losses, gradients and parameters."""
    own = slice(rank * LOCAL, (rank + 1) * LOCAL)
    batch = rows_of(global_batch(LOCAL * world), own)
    results = []
    for sizes in SPLITS:
        model = Model(kind=kind)
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss = BilingualLoss(LossPlan(kind=kind, tile=5, **plan))
        step = ContrastiveStep(wrapped, loss)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        found = []
        for _ in range(2):
            optimizer.zero_grad()
            output = run_step(step, batch, sizes)
            total = output.loss.clone()
            dist.all_reduce(total)
            found.append([total / world, *(g.clone() for g in gradients_of(model))])
            optimizer.step()
        results.append([found, model.encoded])
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "plan", [{"mesh": (2, 2)}, {"group_size": 2}, {"group_size": 1}], ids=["exact", "2", "1"]
)
def test_any_number_of_micro_batches_under_ddp_is_one_batch(kind, plan):
    """Identity 7, with uneven last micro-batches."""
    for results in run_in_world(_steps_under_ddp, 4, 4, kind, plan):
        expected, _ = results[0]
        for sizes, (found, encoded) in zip(SPLITS, results, strict=True):
            for one, other in zip(found, expected, strict=True):
                assert_all_close(one, other)
            passes = 2 * (2 * len(sizes) - 1)  # two steps
            assert encoded == {"images": passes, "texts": passes}


@pytest.mark.parametrize("sizes", SPLITS)
def test_one_process_agrees_with_the_definition(sizes):
    batch = global_batch(LOCAL)
    model, plain = Model(), Model()
    output = run_step(ContrastiveStep(model, BilingualLoss()), batch, sizes)
    expected = definition(plain(batch.images, batch.texts).heads[MAIN], batch)
    expected.backward()
    assert_all_close([output.loss], [expected.detach()])
    assert_all_close(gradients_of(model), gradients_of(plain))


@pytest.mark.parametrize("sizes", SPLITS)
def test_further_heads_and_other_losses_are_weighed_and_reported_apart(sizes):
    batch = global_batch(LOCAL)
    model, plain = Model(further=True), Model(further=True)
    weights = {"second": 3.0, "distance": 0.2}
    step = ContrastiveStep(model, BilingualLoss(), weights=weights)
    output = run_step(step, batch, sizes)
    encoded = plain(batch.images, batch.texts)
    main, second = (definition(head, batch) for head in encoded.heads.values())
    distance = encoded.others["distance"]
    loss = (main + 3 * second) / 4 + 0.2 * distance
    loss.backward()
    assert_all_close([output.loss], [loss.detach()])
    parts = {MAIN: main, "second": second, "distance": distance}
    assert output.parts.keys() == parts.keys()
    assert_all_close(output.parts.values(), [part.detach() for part in parts.values()])
    assert_all_close(gradients_of(model), gradients_of(plain))
    assert not any(each.requires_grad for each in (output.loss, *output.parts.values()))


def test_dropout_leaves_features_alike_where_another_loss_draws_after_them():
    batch = global_batch(LOCAL)
    model, plain = (Model(further=True, dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    run_step(ContrastiveStep(model, BilingualLoss()), batch, (2, 2, 2))
    encoded = []
    torch.manual_seed(3)
    for start in (0, 2, 4):
        part, state = rows_of(batch, slice(start, start + 2)), torch.get_rng_state()
        encoded.append(plain(part.images, part.texts))
        torch.set_rng_state(state)
        with torch.no_grad():
            plain(part.images, part.texts)
    joined = {
        name: Features(
            torch.cat([each.heads[name].image for each in encoded]),
            {key: torch.cat([e.heads[name].text[key] for e in encoded]) for key in LANGUAGES},
            encoded[-1].heads[name].logit_scale,
        )
        for name in encoded[0].heads
    }
    loss = sum(definition(head, batch) for head in joined.values()) / 2
    (loss + sum(each.others["distance"] for each in encoded) / 3).backward()
    assert_all_close(gradients_of(model), gradients_of(plain))


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_another_loss_has_a_frozen_tower_encoded_again(frozen):
    batch = global_batch(LOCAL)
    found = []
    for sizes in ((6,), (2, 2, 2)):
        model = Model(further=True)
        getattr(model, frozen).requires_grad_(False)
        run_step(ContrastiveStep(model, BilingualLoss()), batch, sizes)
        found.append(gradients_of(model))
    assert_all_close(*found)
    assert model.encoded == {"images": 5, "texts": 5}


def test_one_pass_adds_the_other_losses_of_its_micro_batches():
    batch = global_batch(LOCAL)
    model, plain = Model(further=True), Model(further=True)
    step = ContrastiveStep(model, BilingualLoss(), mode="one_pass", weights={"distance": 1e6})
    output = run_step(step, batch, (4, 2))
    distance = plain(batch.images, batch.texts).others["distance"]
    distance.backward()
    torch.testing.assert_close(output.parts["distance"], distance.detach())
    torch.testing.assert_close(model.image.grad / 1e6, plain.image.grad, rtol=1e-4, atol=1e-4)


def _further_steps_under_ddp(rank, world):
    own = slice(rank * LOCAL, (rank + 1) * LOCAL)
    batch = rows_of(global_batch(LOCAL * world), own)
    results = []
    for sizes in SPLITS:
        model = Model(further=True)
        wrapped = nn.parallel.DistributedDataParallel(model)
        step = ContrastiveStep(wrapped, BilingualLoss())
        run_step(step, batch, sizes)
        results.append(gradients_of(model))
    return results


@pytest.mark.distributed
def test_further_heads_and_other_losses_under_ddp_are_those_of_one_process():
    batch, plain = global_batch(2 * LOCAL), Model(further=True)
    encoded = plain(batch.images, batch.texts)
    heads = sum(definition(head, batch) for head in encoded.heads.values()) / 2
    (heads + encoded.others["distance"]).backward()
    for results in run_in_world(_further_steps_under_ddp, 2, 2):
        for gradients in results:
            assert_all_close(gradients, gradients_of(plain))


@pytest.mark.parametrize("sizes", SPLITS[1:])
def test_dropout_and_the_random_numbers_after_it_are_those_of_a_single_pass(sizes):
    """Identity 7: both encodings of a sample see the same mask, so the graphs' loss is the same."""
    batch = global_batch(LOCAL)
    model, plain = Model(dropout=0.5), Model(dropout=0.5)
    torch.manual_seed(3)
    run_step(ContrastiveStep(model, BilingualLoss()), batch, sizes)
    after = torch.rand(3)
    torch.manual_seed(3)
    encoded = []
    for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
        part = rows_of(batch, slice(end - size, end))
        encoded.append(plain(part.images, part.texts).heads[MAIN])
    assert torch.equal(after, torch.rand(3))
    loss = BilingualLoss()
    texts = {name: torch.cat([each.text[name] for each in encoded]) for name in LANGUAGES}
    loss(
        torch.cat([each.image for each in encoded]), loss.send_texts(texts),
        encoded[-1].logit_scale, batch.image_ids, batch.caption_ids,
    ).loss.backward()  # fmt: skip
    assert_all_close(gradients_of(model), gradients_of(plain))


def test_running_statistics_see_every_micro_batch_once():
    batch = global_batch(LOCAL)
    model, plain = Model(batch_norm=True), Model(batch_norm=True)
    run_step(ContrastiveStep(model, BilingualLoss()), batch, (2, 2, 2))
    for start in (0, 2, 4):
        plain(batch.images[start : start + 2], {})
    assert model.norm.num_batches_tracked == 3
    assert_all_close(list(model.buffers()), list(plain.buffers()))


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_is_encoded_once(frozen):
    batch = global_batch(LOCAL)
    found = []
    for sizes in ((6,), (2, 2, 2)):
        model = Model()
        getattr(model, frozen).requires_grad_(False)
        run_step(ContrastiveStep(model, BilingualLoss()), batch, sizes)
        found.append(gradients_of(model))
    assert_all_close(*found)
    assert getattr(model, frozen).grad is None
    passes = {"image": {"images": 3, "texts": 5}, "text": {"images": 5, "texts": 3}}
    assert model.encoded == passes[frozen]


def test_a_frozen_temperature_and_towers_that_need_nothing_but_it():
    batch = global_batch(LOCAL)
    model = Model()
    model.log_scale.requires_grad_(False)
    run_step(ContrastiveStep(model, BilingualLoss()), batch, (3, 3))
    assert model.log_scale.grad is None
    assert model.image.grad.abs().sum() > 0


def _exchanges(rank, sizes):
    model = Model()
    batch = rows_of(global_batch(2 * LOCAL), slice(rank * LOCAL, (rank + 1) * LOCAL))
    step = ContrastiveStep(model, BilingualLoss(LossPlan(mesh="text")))
    with TensorMeter() as meter:
        run_step(step, batch, sizes)
    return meter.collectives


@pytest.mark.distributed
def test_features_of_all_micro_batches_travel_at_once():
    # What each brings of texts and of images, two languages, ids, and two merges; gradients home.
    expected = {"_allgather_base_": 7, "_reduce_scatter_base_": 2}
    for collectives in run_in_world(_exchanges, 2, (2, 2, 2)):
        assert collectives == expected


def one_pass_definition(batch, sizes, plain):
    """Each micro-batch's rows and columns against all up to it, the earlier ones detached."""
    total = 0
    bank = []
    for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
        part = rows_of(batch, slice(end - size, end))
        image, text, scale, _ = plain(part.images, part.texts).heads[MAIN]
        for name in LANGUAGES:
            images = torch.cat([image, *(b[0] for b in bank)])
            texts = torch.cat([text[name], *(b[1][name] for b in bank)])
            ids = torch.cat([part.image_ids, *(b[2] for b in bank)])
            captions = torch.cat([part.caption_ids[name], *(b[3][name] for b in bank)])
            same = matches(ids.tolist(), captions.tolist())[:size].double()
            target = same / same.sum(1, keepdim=True)
            by_row = F.cross_entropy(scale * image @ texts.T, target)
            by_column = F.cross_entropy(scale * text[name] @ images.T, target)
            total = total + (by_row + by_column) / 4 * size / sum(sizes)
        detached = {name: x.detach() for name, x in text.items()}
        bank.append((image.detach(), detached, part.image_ids, part.caption_ids))
    return total


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("tile", [2, 100])
def test_one_pass_contrasts_each_micro_batch_with_itself_and_those_before(sizes, tile):
    batch = global_batch(LOCAL)
    model, plain = Model(), Model()
    step = ContrastiveStep(model, BilingualLoss(LossPlan(tile=tile)), mode="one_pass")
    output = run_step(step, batch, sizes)
    expected = one_pass_definition(batch, sizes, plain)
    expected.backward()
    assert_all_close([output.loss], [expected.detach()])
    assert_all_close(gradients_of(model), gradients_of(plain))
    assert model.encoded == {"images": len(sizes), "texts": len(sizes)}


def _one_pass_on_ranks(rank, world, mesh, duplicates):
    model = Model()
    batch = rows_of(global_batch(LOCAL * world), slice(rank * LOCAL, (rank + 1) * LOCAL))
    wrapped = nn.parallel.DistributedDataParallel(model)
    plan = LossPlan(mesh=mesh, tile=4, duplicates=duplicates)
    step = ContrastiveStep(wrapped, BilingualLoss(plan), mode="one_pass")
    output = run_step(step, batch, (2, 4))
    total = output.loss.clone()
    dist.all_reduce(total)
    return [total / world, *gradients_of(model)]


@pytest.mark.distributed
@pytest.mark.parametrize("duplicates", ["positive", "ignore"])
def test_one_pass_on_a_mesh_is_one_pass_on_one_process(duplicates):
    """Micro-batch k of all ranks together is micro-batch k of the one process."""
    world = 4
    order = [r * LOCAL + k for ks in ((0, 1), (2, 3, 4, 5)) for r in range(world) for k in ks]
    model = Model()
    step = ContrastiveStep(model, BilingualLoss(LossPlan(duplicates=duplicates)), mode="one_pass")
    output = run_step(step, rows_of(global_batch(LOCAL * world), order), (8, 16))
    expected = [output.loss, *gradients_of(model)]
    for mesh in ((2, 2), "text"):
        for found in run_in_world(_one_pass_on_ranks, world, world, mesh, duplicates):
            assert_all_close(found, expected)


def test_one_pass_needs_as_many_samples_from_every_rank():
    with pytest.raises(ConfigError, match=r"one_pass needs loss\.plan\.even true"):
        ContrastiveStep(Model(), BilingualLoss(LossPlan(even=False)), mode="one_pass")


def scaled_gradients(mode, sizes):
    """The gradients of a step through a gradient scaler, and after the scaler's own unscaling."""
    batch, model = global_batch(LOCAL), Model(further=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = ContrastiveStep(
        model, BilingualLoss(), mode=mode, weights={"distance": 0.2},
        backward=lambda loss: scaler.scale(loss).backward(),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run_step(step, batch, sizes)
    scaled = [gradient.clone() for gradient in gradients_of(model)]
    scaler.unscale_(optimizer)
    return scaled, gradients_of(model)


@pytest.mark.parametrize(
    ("mode", "sizes"), [("exact", (6,)), ("exact", (3, 2, 1)), ("one_pass", (4, 2))]
)
def test_a_gradient_scaler_scales_every_gradient_once(mode, sizes):
    batch, model = global_batch(LOCAL), Model(further=True)
    step = ContrastiveStep(model, BilingualLoss(), mode=mode, weights={"distance": 0.2})
    run_step(step, batch, sizes)
    expected = gradients_of(model)
    scaled, unscaled = scaled_gradients(mode, sizes)
    assert_all_close(unscaled, expected)
    assert_all_close(scaled, [1024 * gradient for gradient in expected])
