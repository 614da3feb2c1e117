"""Moments in bfloat16: as plain optimizers whose moments are rounded by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.tiny_run import STEPS, config, losses
from vlm.errors import ConfigError
from vlm.training.build import build_run
from vlm.training.config import ClusterConfig, EvaluationConfig, OptimizerConfig
from vlm.training.optimization import optimizer as optimizer_module
from vlm.training.optimization.optimizer import build_optimizer, reads_found_inf
from vlm.training.planning.dry_run import dry_run
from vlm.training.saving.state import OptimizerState

NAMES = ["adamw", "muon", "lion"]


class Towers(nn.Module):
    """A matrix of a block, a kernel with its channels innermost, and a number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Linear(6, 5)
        self.encoder = nn.ModuleDict({"block": block, "stem": nn.Conv2d(4, 3, 2)})
        self.encoder.to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.encoder.image_groups = lambda: [[], list(block.parameters()), []]
        self.encoder.text_groups = lambda: [[], []]


def steps_of(name, dtype, number, after=lambda optimizer: None):
    """A model and its optimizer after steps, each with its own gradients."""
    model = Towers()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, state_dtype=dtype))
    take_steps(model, optimizer, range(number), after)
    return model, optimizer


def take_steps(model, optimizer, steps, after=lambda optimizer: None):
    for step in steps:
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        after(optimizer)


def round_moments(optimizer):
    for slots in optimizer.state.values():
        for key, value in slots.items():
            if key != "step":
                value.copy_(value.bfloat16())


@pytest.mark.parametrize("numbers", [1 << 26, 8])
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_plain_optimizer_with_moments_rounded_after_each(
    monkeypatch, name, numbers
):
    monkeypatch.setattr(optimizer_module, "_WIDENED", numbers)  # all at a time, or a few
    expected, rounded = steps_of(name, "float32", 5, round_moments)
    model, optimizer = steps_of(name, "bfloat16", 5)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    moments = OptimizerState(expected, rounded).state_dict()
    found = OptimizerState(model, optimizer).state_dict()
    assert found.keys() == moments.keys()
    for key, value in found.items():
        assert value.dtype == (torch.float32 if key.endswith("step") else torch.bfloat16), key
        assert torch.equal(value.float(), moments[key]), key


def test_steps_are_counted_beyond_256_where_bfloat16_stops():
    _, optimizer = steps_of("adamw", "bfloat16", 300)
    assert {int(slots["step"]) for slots in optimizer.state.values()} == {300}


@pytest.mark.parametrize("name", NAMES)
def test_moments_go_through_a_checkpoint_bit_for_bit_and_lie_as_their_parameter_does(name):
    model, optimizer = steps_of(name, "bfloat16", 3)
    kept = OptimizerState(model, optimizer).state_dict()
    kept = {key: value.clone(memory_format=torch.contiguous_format) for key, value in kept.items()}
    other, resumed = steps_of(name, "bfloat16", 0)
    other.load_state_dict(model.state_dict())
    OptimizerState(other, resumed, torch.bfloat16).load_state_dict(kept)
    stem = other.encoder["stem"].weight
    assert {value.stride() for key, value in resumed.state[stem].items() if key != "step"} == {
        stem.stride()
    }
    take_steps(model, optimizer, range(3, 6))
    take_steps(other, resumed, range(3, 6))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_a_step_that_the_device_skips_leaves_weights_and_moments_as_they_were():
    model, optimizer = steps_of("adamw", "bfloat16", 2)
    assert reads_found_inf(optimizer)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    moments = {
        key: value.clone() for key, value in OptimizerState(model, optimizer).state_dict().items()
    }
    optimizer.optimizer.found_inf = torch.ones(())
    take_steps(model, optimizer, [2])
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value), key
    for key, value in OptimizerState(model, optimizer).state_dict().items():
        assert torch.equal(value, moments[key]), key


def settings_of(inputs, folder, dtype, name="adamw"):
    optimizer = OptimizerConfig(name=name, state_dtype=dtype)
    quiet = EvaluationConfig()
    return config(inputs, folder, optimizer=optimizer, evaluation=quiet, report_every=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_runs_losses_are_near_those_in_float32_and_its_moments_half_as_large(
    inputs, tmp_path, name
):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        build_run(settings_of(inputs, tmp_path / dtype, dtype, name)).fit()
        kept = tmp_path / dtype / "checkpoints" / f"step-{STEPS:08d}"
        sizes[dtype] = (kept / "optimizer.safetensors").stat().st_size
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=0.01)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")
    assert 0.5 <= sizes["bfloat16"] / sizes["float32"] < 0.6  # with names, and counts of steps


@pytest.mark.parametrize(("before", "now"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_goes_on_with_its_moments_in_the_other_type_and_says_so(
    inputs, tmp_path, before, now
):
    build_run(settings_of(inputs, tmp_path, before)).fit()
    settings = settings_of(inputs, tmp_path, now)
    run = build_run(
        replace(settings, schedule=replace(settings.schedule, steps=STEPS + 1)), resume="auto"
    )
    said = f"from: optimizer.state_dtype {now} (was {before}): the moments are converted"
    assert said in run.describe().splitlines()
    moments = run.state["optimizer"].state_dict()
    assert {str(value.dtype) for key, value in moments.items() if not key.endswith(".step")} == {
        f"torch.{now}"
    }
    run.fit()
    assert losses(tmp_path)[STEPS + 1] > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_counts_moments_of_half_the_bytes(inputs, tmp_path, name):
    plans = [
        dry_run(settings_of(inputs, tmp_path, dtype, name), ClusterConfig()).numbers["memory"]
        for dtype in ("float32", "bfloat16")
    ]
    kinds = [kind for kind in plans[1] if kind.startswith("optimizer ")]  # small ones are not named
    assert kinds
    for kind in kinds:
        assert plans[1][kind] * 2 == plans[0][kind]


@pytest.mark.parametrize("name", NAMES)
def test_moments_that_follow_gradients_too_slowly_for_bfloat16_are_refused(name):
    OptimizerConfig(name=name, betas=(0.9, 0.999))
    with pytest.raises(ConfigError, match=r"betas \(0.9, 0.999\); expected betas of at most 0.98"):
        OptimizerConfig(name=name, betas=(0.9, 0.999), state_dtype="bfloat16")
