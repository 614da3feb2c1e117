"""Stages: what each trains, at which rate and on what, over kills and on several ranks."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.builders import (
    IMAGE_SIZE,
    TINY_MODEL,
    tiny_model,
    tiny_tokenizer,
)
from tests.support.processes import run_in_world
from vlm.batches.config import DataConfig, MixedSourceConfig, MixtureConfig, PhaseConfig
from vlm.batches.mixture import mixture_of
from vlm.errors import ConfigError
from vlm.models.growth import only_new_rows, own_rows_before
from vlm.models.pretraining import PretrainingModel
from vlm.training.build import build_run
from vlm.training.config import (
    AdaptationConfig,
    CheckpointConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from vlm.training.optimization.stages import StageLocks, learning_rate_at

STAGES = (
    StageConfig(steps=2, trained="text"),
    StageConfig(steps=2, trained="image", learning_rate=3e-3),
    StageConfig(),
)
STEPS = 6


def config(inputs, run_folder, **changes):
    settings = {
        "run_folder": run_folder,
        "tokenizer": inputs / "tokenizer",
        "model": TINY_MODEL,
        "data": DataConfig(folder=inputs / "data", batch_size=4, workers=0),
        "optimizer": OptimizerConfig(learning_rate=1e-2, weight_decay=0.5),
        "schedule": ScheduleConfig(steps=STEPS, warmup_steps=1),
        "stages": STAGES,
        "checkpoint": CheckpointConfig(every_steps=1, keep=9),
    }
    return TrainConfig(**(settings | changes))


def staged(*stages, **schedule):
    return TrainConfig(stages=stages, schedule=ScheduleConfig(**schedule))


def test_every_stage_rises_to_its_own_rate_and_falls_by_the_shape_of_the_schedule():
    stages = (
        StageConfig(steps=4, learning_rate=2.0, warmup_steps=2),
        StageConfig(steps=4, warmup_steps=0),
    )
    settings = staged(*stages, steps=8, warmup_steps=3)
    rates = [learning_rate_at(step, settings) for step in range(8)]
    # Half a cosine from its top, at 0 and 1/2 of its length, then at quarters of it.
    quarters = [(2 + root) / 4 for root in (2, 2**0.5, 0, -(2**0.5))]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.0, *(1e-3 * each for each in quarters)])


def test_a_run_without_stages_is_one():
    settings = staged(steps=8, warmup_steps=3)
    (stage,) = settings.whole_stages
    assert (stage.first, stage.end, stage.trained) == (0, 8, "all")
    assert stage.schedule == settings.schedule


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((3, 4), r"the stages have 3, 4 steps and schedule.steps is 8; expected 8 in all"),
        (
            (8, None),
            "8, null steps and schedule.steps is 8; expected 8 in all; the last may be null",
        ),
        ((None, 4), "have null, 4 steps and schedule.steps is 8; expected 8 in all"),
        ((6, None), "warmup_steps is 2 in a schedule or stage of 2 steps"),
    ],
)
def test_steps_that_do_not_add_up_are_refused(steps, message):
    with pytest.raises(ConfigError, match=message):
        staged(*(StageConfig(steps=each) for each in steps), steps=8, warmup_steps=2)


def tensors(run_folder, step, part="model"):
    return load_file(run_folder / f"checkpoints/step-{step:08d}/{part}.safetensors")


def tower_of(name):
    return name.removeprefix("encoder.").split(".")[0]


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The folder of a run over all its stages, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("whole")
    build_run(config(inputs, folder)).fit()
    return folder


def test_a_stage_changes_what_it_trains_and_leaves_the_other_tower_bit_for_bit(whole):
    saved = {step: tensors(whole, step) for step in range(1, STEPS + 1)}
    for before, after in itertools.pairwise(saved):
        changed = {
            tower_of(name)
            for name, tensor in saved[after].items()
            if not torch.equal(tensor, saved[before][name])
        }
        trained = {"text": {"text"}, "image": {"visual"}, "all": {"text", "visual"}}
        stage = ("text", "image", "all")[before // 2]
        assert changed == trained[stage] | {"log_logit_scale"}, (before, after)


def test_what_is_locked_has_no_moments(whole):
    for step, towers in ((2, {"text"}), (4, {"visual"}), (6, {"text", "visual"})):
        moments = tensors(whole, step, "optimizer")
        assert {tower_of(name) for name in moments} == towers | {"log_logit_scale"}
        counts = {float(value) for name, value in moments.items() if name.endswith(".step")}
        assert counts == {2.0}


def cut_after(settings, step):
    """Train to a step and no further, with a checkpoint there."""

    def end(encoder):
        raise KeyboardInterrupt

    cut = replace(settings, evaluation=replace(settings.evaluation, every_steps=step))
    run = build_run(settings)
    with pytest.raises(KeyboardInterrupt):
        replace(run, config=cut, evaluate=end).fit()
    assert run.progress.step == step
    if not (settings.run_folder / f"checkpoints/step-{step:08d}").exists():
        run.checkpoints.save(step, run.state)  # whether it is saved before or after it is scored


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_resuming_in_a_stage_and_between_two_gives_the_same_bits(inputs, whole, tmp_path, stop):
    settings = config(inputs, tmp_path)
    cut_after(settings, stop)
    build_run(settings, resume="auto").fit()
    for part in ("model", "optimizer"):
        found, expected = tensors(tmp_path, STEPS, part), tensors(whole, STEPS, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), part


def test_stages_to_come_may_change_and_what_was_trained_until_now_may_not(inputs, whole, tmp_path):
    settings = config(inputs, tmp_path)
    cut_after(settings, 3)
    other = (*STAGES[:2], StageConfig(steps=2, trained="text", learning_rate=1e-4))
    with pytest.raises(ConfigError, match=r"stages .* the moments are those of what was trained"):
        build_run(replace(settings, stages=(STAGES[0], StageConfig())), resume="auto")
    build_run(replace(settings, stages=other), resume="auto").fit()
    whole_other = config(inputs, tmp_path / "other", stages=other)
    build_run(whole_other).fit()
    found, expected = tensors(tmp_path, STEPS), tensors(tmp_path / "other", STEPS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(found[name], each) for name, each in tensors(whole, STEPS).items())


def test_the_description_counts_what_the_stage_trains(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path))
    text = sum(p.numel() for p in run.start.model.text.parameters()) + 1  # the temperature
    assert f"({text:,} trained)" in run.describe()


def test_moments_go_on_where_two_stages_train_the_same(inputs, tmp_path):
    stages = (StageConfig(steps=3), StageConfig(learning_rate=1e-3))
    build_run(config(inputs, tmp_path, stages=stages)).fit()
    moments = tensors(tmp_path, STEPS, "optimizer")
    assert {float(v) for name, v in moments.items() if name.endswith(".step")} == {STEPS}


def test_a_locked_tower_has_no_graph(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path, stages=(StageConfig(trained="text"),)))
    batch = next(run.loader.read(run.data, 1))
    run.model.train()
    (head,) = run.model(batch.images, batch.texts).heads.values()
    assert head.image.grad_fn is None
    assert all(each.grad_fn is not None for each in head.text.values())


def test_a_stage_that_finds_all_of_its_parts_locked_is_refused(inputs, tmp_path):
    adapt = AdaptationConfig(text_unlocked_groups=0)
    tokenizer = tiny_tokenizer()
    encoder = tiny_model(tokenizer)
    for group in (*encoder.image_groups(), [encoder.log_logit_scale]):
        for parameter in group:
            parameter.requires_grad_(False)
    settings = config(inputs, tmp_path, stages=(StageConfig(trained="image"),), adapt=adapt)
    optimizer = torch.optim.AdamW(encoder.parameters())
    with pytest.raises(ConfigError, match="a stage trains image, but adapt locks all of that"):
        StageLocks(settings, encoder, encoder, optimizer, None)


def _wrapped(model, wrapper):
    if wrapper == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if wrapper == "FSDP2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = model.to(memory_format=torch.contiguous_format)  # it shards no other
        fully_shard(model, mesh=mesh, ignored_params={model.encoder.log_logit_scale})
    return model


def _gradients_by_stage(rank, world, wrapper=None):
    """The norms of every parameter's gradient in each stage."""
    tokenizer = tiny_tokenizer()
    encoder = tiny_model(tokenizer)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    texts = {"en": tokenizer.encode(["red apple", "small dog", "hot soup", "green tea"])}
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    part = {"en": type(texts["en"])(texts["en"].ids[own], texts["en"].mask[own])}
    inner = PretrainingModel(encoder).eval()  # batch norm over few images would differ
    model = _wrapped(inner, wrapper)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
    settings = staged(*STAGES, steps=STEPS, warmup_steps=1)
    locks = StageLocks(settings, model, encoder, optimizer, None)
    found = []
    for step in range(STEPS):
        locks.enter(step)
        (head,) = model(images[own], part).heads.values()
        # A mean over samples: the mean of the ranks' means is that of all.
        ((head.image * head.text["en"]).sum(1).square().mean() * head.logit_scale).backward()
        wanted = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        norms = {name: gradient.norm() for name, gradient in wanted.items()}
        found.append(
            {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in norms.items()}
        )
        optimizer.zero_grad()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_ranks_average_the_gradients_of_every_stage(wrapper):
    expected = _gradients_by_stage(0, 1)
    for found in run_in_world(_gradients_by_stage, 2, 2, wrapper):
        for one, other in zip(found, expected, strict=True):
            if wrapper == "FSDP2":
                one["log_logit_scale"] = other["log_logit_scale"]  # a scalar, which it leaves alone
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert [{tower_of(name) for name in each} for each in expected[::2]] == [
        {"text", "log_logit_scale"},
        {"visual", "log_logit_scale"},
        {"text", "visual", "log_logit_scale"},
    ]


ROWS, OLD, WIDTH = 7, 4, 3


def _trained_rows(rank, sharded):
    """The weights of an embedding whose new rows took three steps, whole, on every rank."""
    torch.manual_seed(0)
    embedding = nn.Embedding(ROWS, WIDTH)
    if sharded:
        fully_shard(embedding, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    weight = embedding.weight
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    old_rows = own_rows_before(OLD, weight)
    norms = []
    for step in range(3):
        ids = torch.arange(ROWS)
        (embedding(ids) * torch.full((ROWS, 1), 1.0 + step)).square().sum().backward()
        with only_new_rows(weight, old_rows):
            norm = nn.utils.clip_grad_norm_([weight], 0.5)
            norms.append(norm.full_tensor() if sharded else norm)
            optimizer.step()
        optimizer.zero_grad()
    return (weight.full_tensor() if sharded else weight).detach(), torch.stack(norms).detach()


@pytest.mark.distributed
def test_new_rows_of_a_sharded_embedding_train_as_those_of_a_whole_one():
    """Four rows a rank, the last of the first rank's and none of the second's being old."""
    torch.manual_seed(0)
    start = nn.Embedding(ROWS, WIDTH).weight.detach()
    expected, norms = _trained_rows(0, sharded=False)
    assert torch.equal(expected[:OLD], start[:OLD])
    assert (expected[OLD:] != start[OLD:]).all()
    for world in (2, 4):
        for found, its_norms in run_in_world(_trained_rows, world, True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(its_norms, norms)
            assert torch.equal(found[:OLD], start[:OLD])


def sources(**weights):
    return tuple(
        MixedSourceConfig(path=f"{name}.csv", name=name, weight=weight)
        for name, weight in weights.items()
    )


def shares(skip=()):
    data = DataConfig(sources=sources(a=1, b=3), skip_batches=skip)
    mixture = mixture_of(data, {"a": 10, "b": 10}, [(2, {"a": 1}), (4, None), (9, {"b": 1})])
    return [mixture.shares(batch).tolist() for batch in range(9) if not mixture.skips(batch)]


def test_a_stage_has_its_own_mixture_or_that_of_the_sources():
    assert shares() == [[1, 0]] * 2 + [[0.25, 0.75]] * 2 + [[0, 1]] * 5


@pytest.mark.parametrize("skip", [((1, 2),), ((0, 1), (1, 3)), ((2, 2), (4, 4))])
def test_batches_that_are_passed_over_do_not_move_the_mixture_of_a_stage(skip):
    assert shares(skip)[:5] == [[1, 0]] * 2 + [[0.25, 0.75]] * 2 + [[0, 1]]


@pytest.mark.parametrize(
    ("mixture", "weights", "message"),
    [
        ((PhaseConfig(weights={"a": 1}),), {"a": 1}, "both in stages and in the schedule"),
        ((), {"c": 1}, "a stage has weights of c; expected those of a, b"),
        ((), {"a": 0}, "a stage has the weights .* expected none below 0, and one above"),
    ],
)
def test_weights_of_a_stage_that_do_not_fit_are_refused(mixture, weights, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(
            data=DataConfig(sources=sources(a=1, b=1), mixture=MixtureConfig(schedule=mixture)),
            stages=(StageConfig(weights=weights),),
        )
