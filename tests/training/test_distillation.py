"""A run's teacher: what it makes of a batch, over micro-batches and ranks, and what it refuses."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.builders import make_samples, tiny_bundle, write_split
from tests.support.processes import run_in_world
from tests.support.vectors import batch_of_vectors, image_vectors, rows_of, text_vectors
from vlm.batches.config import CaptionConfig, DataConfig
from vlm.bundle import load_bundle
from vlm.distributed.groups import world_group
from vlm.errors import CheckpointError, ConfigError
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.plan import DistillationConfig
from vlm.models.encoder import MAIN, Encoder
from vlm.models.pretraining import Encoded, Features
from vlm.text.caption_ids import NO_CAPTION
from vlm.training.build import build_run
from vlm.training.config import (
    CheckpointConfig,
    ObjectivesConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from vlm.training.distillation import Distillation
from vlm.training.monitoring.reporter import METRICS_NAME, read_records
from vlm.training.step import ContrastiveStep

SAMPLES, WIDTH, DIM = 8, 5, 4
ALL = DistillationConfig(feature_weight=0.5, structure_weight=2.0, logit_weight=3.0)
LANGUAGES = {"zh": "zh", "zh second": "zh", "en": "en", "en second": "en"}


class Towers(Encoder):
    """Two matrices, called as a training model and as an encoder."""

    def __init__(self, seed):
        super().__init__(init_logit_scale=1.0, init_logit_bias=None)
        generator = torch.Generator().manual_seed(seed)
        image, text = torch.randn(2, WIDTH, DIM, generator=generator, dtype=torch.float64)
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)
        self.log_logit_scale = nn.Parameter(torch.tensor(0.1 * seed, dtype=torch.float64))
        self.read = []

    def encode_image(self, images):
        return F.normalize(image_vectors(images) @ self.image, dim=-1)

    def encode_text(self, tokens):
        self.read.append(len(tokens.ids))
        return F.normalize(text_vectors(tokens) @ self.text, dim=-1)

    def forward(self, images, texts, hidden=None, on_texts=None):
        text = {name: self.encode_text(tokens) for name, tokens in texts.items()}
        if on_texts:
            on_texts(MAIN, text)
        image = None if images is None else self.encode_image(images)
        return Encoded({MAIN: Features(image, text, self.logit_scale)}, {})


Towers.__abstractmethods__ = frozenset()  # neither calls them


def batch_of(languages=("zh", "en")):
    """Samples with captions in both languages; some lack one or the other."""
    generator = torch.Generator().manual_seed(5)
    images, *texts = torch.randn(3, SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    ids = torch.arange(SAMPLES)
    lacks = {"zh": ids % 4 == 1, "en": ids % 3 == 2}
    captions = {name: torch.where(lacks[name], NO_CAPTION, ids + 100) for name in languages}
    return batch_of_vectors(images, dict(zip(languages, texts, strict=True)), ids, captions)


def distillation(teacher, config=ALL, known=("en",)):
    return Distillation(
        config=config,
        encoder=teacher,
        languages=LANGUAGES,
        known=frozenset(known),
        group=world_group(),
        autocast=nullcontext,
        fingerprint="first",
    )


def step_of(model, mode="exact"):
    """A step whose contrast counts nothing next to the losses of a teacher."""
    weights = {MAIN: 1.0} | {name: 1e9 * w for name, w in ALL.weights.items()}
    distilled = distillation(Towers(2))
    return ContrastiveStep(
        model, BilingualLoss(), mode=mode, weights=weights, distillation=distilled
    )


SPLITS = [1, 2, 3]


def _steps(rank, world):
    rows = SAMPLES // world
    batch = rows_of(batch_of(), slice(rank * rows, (rank + 1) * rows))
    found = []
    for parts in SPLITS:
        inner = Towers(1)
        model = nn.parallel.DistributedDataParallel(inner) if world > 1 else inner
        output = step_of(model)(batch.split(parts))
        parts_of = torch.stack([output.parts[name] for name in ALL.weights])
        if world > 1:
            dist.all_reduce(parts_of)
        found.append([parts_of / world, *(p.grad / 1e9 for p in inner.parameters())])
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_and_ranks_have_the_losses_and_gradients_of_one_batch(world):
    batch, model, teacher = batch_of(), Towers(1), distillation(Towers(2))
    head = model(batch.images, batch.texts).heads[MAIN]
    text = {}
    for name, features in head.text.items():
        rows = features.new_zeros(SAMPLES, DIM)
        text[name] = rows.index_copy(0, batch.text_rows[name], features)
    losses = teacher.losses(head._replace(text=text), [teacher.targets(batch)])
    sum(ALL.weights[name] * loss for name, loss in losses.items()).backward()
    expected = [torch.stack(list(losses.values())), *(p.grad for p in model.parameters())]
    ranks = [_steps(0, 1)] if world == 1 else run_in_world(_steps, world, world)
    for found in ranks:
        for split in found:
            torch.testing.assert_close(split, [each.detach() for each in expected])


def test_the_teacher_encodes_each_micro_batch_once_and_only_what_it_reads():
    model = Towers(1)
    step = step_of(model)
    step(batch_of().split(2))
    assert step.distillation.encoder.read == [3, 3]  # English alone


def test_one_pass_has_the_mean_of_the_micro_batches_own_losses():
    batch, model = batch_of(), Towers(1)
    output = step_of(model, mode="one_pass")(batch.split(2))
    halves = [step_of(model)([part]) for part in batch.split(2)]
    for name in ALL.weights:
        mean = sum(each.parts[name] for each in halves) / 2
        torch.testing.assert_close(output.parts[name], mean)


def test_a_caption_that_the_teacher_does_not_read_has_the_target_of_one_that_it_does():
    batch, teacher = batch_of(), Towers(2)
    targets = distillation(teacher).targets(batch)
    has = {
        name: torch.zeros(SAMPLES, dtype=torch.bool).index_fill(0, rows, True)
        for name, rows in batch.text_rows.items()
    }
    assert torch.equal(targets.there["en"], has["en"])
    assert torch.equal(targets.there["zh"], has["zh"] & has["en"])
    torch.testing.assert_close(
        targets.text["en"][has["en"]], teacher.encode_text(batch.texts["en"])
    )
    assert torch.equal(targets.text["zh"], targets.text["en"])
    assert not any(each.requires_grad for each in (targets.image, *targets.text.values()))


def test_without_targets_across_languages_only_what_the_teacher_reads_has_one():
    config = replace(ALL, across_languages=False)
    assert distillation(Towers(2), config).targets(batch_of()).text.keys() == {"en"}
    both = distillation(Towers(2), config, known=("en", "zh")).targets(batch_of())
    assert both.text.keys() == {"zh", "en"}
    assert not torch.equal(both.text["zh"], both.text["en"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Data with captions in both languages, a bundle, and one with other weights."""
    folder = tmp_path_factory.mktemp("inputs")
    write_split(folder / "data", make_samples(12))
    tiny_bundle(folder / "start")
    tiny_bundle(folder / "other", seed=1)
    tiny_bundle(folder / "longer", context_length=20)
    return folder


def config(inputs, run_folder, **distilled):
    plan = DistillationConfig(**{"feature_weight": 1.0, "languages": ("en",)} | distilled)
    return TrainConfig(
        run_folder=run_folder,
        start_from=inputs / "start",
        data=DataConfig(folder=inputs / "data", batch_size=4, workers=0),
        captions=CaptionConfig(main_ratio=1.0),
        objectives=ObjectivesConfig(distillation=plan),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(steps=4, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
        report_every=1,
    )


def test_a_run_reports_each_loss_towards_its_start_and_says_what_has_targets(inputs, tmp_path):
    settings = config(inputs, tmp_path, structure_weight=1.0, logit_weight=1.0)
    run = build_run(settings)
    fingerprint = load_bundle(inputs / "start").fingerprint[:12]
    assert f"teacher: {fingerprint}, for images, captions in en, those in zh by the former" in (
        run.describe()
    )
    run.fit()
    records = read_records(tmp_path / METRICS_NAME)
    assert all(f"loss/{name}" in records[-1] for name in settings.objectives.distillation.weights)
    teacher = run.distillation.encoder
    before = load_bundle(inputs / "start").model.state_dict()
    assert all(torch.equal(each, before[name]) for name, each in teacher.state_dict().items())
    assert not any("teacher" in name for name in run.state["model"].state_dict())


def test_a_run_does_not_go_on_with_another_teacher(inputs, tmp_path):
    settings = config(inputs, tmp_path, teacher=inputs / "start")
    build_run(settings).fit()
    moved = inputs / "start"
    kept = moved.rename(inputs / "kept")
    try:
        moved.symlink_to(inputs / "other")
        with pytest.raises(CheckpointError, match="the teacher of the run has changed"):
            build_run(settings, resume="auto")
    finally:
        moved.unlink()
        kept.rename(moved)
    assert build_run(settings, resume="auto").progress.step == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "longer"}, "has another tokenizer than the run; expected the same"),
        (
            {"languages": ("fr",), "logit_weight": 1.0},
            "logit_weight is 1.0, but the teacher reads fr and captions are in zh, en",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(inputs, tmp_path, changes, message):
    if "teacher" in changes:
        changes = changes | {"teacher": inputs / changes["teacher"]}
    with pytest.raises(ConfigError, match=message):
        build_run(config(inputs, tmp_path, **changes))


def test_a_run_with_no_teacher_to_take_is_refused(inputs, tmp_path):
    settings = replace(
        config(inputs, tmp_path), start_from=None, tokenizer=inputs / "start/tokenizer"
    )
    with pytest.raises(ConfigError, match="has a weight and no teacher; expected its teacher"):
        build_run(settings)
