"""Optimizers against their formulas, and the rate and decay of every parameter by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.builders import tiny_model, tiny_tokenizer
from vlm.errors import ConfigError
from vlm.models.build import build_from_config
from vlm.models.config import ModelConfig, MultiwayConfig
from vlm.models.pretraining import PretrainingModel
from vlm.training.config import OptimizerConfig, TowerRateConfig
from vlm.training.optimizer import RATE_RATIO, build_optimizer


@pytest.fixture(scope="module")
def model():
    return PretrainingModel(tiny_model(tiny_tokenizer()))


def by_name(model, optimizer, key):
    """A setting of every parameter, by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], group[key]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_only_matrices_and_kernels_decay(model):
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    assert by_name(model, optimizer, "weight_decay") == {
        name: 0.3 if parameter.ndim >= 2 else 0.0 for name, parameter in model.named_parameters()
    }
    assert set(by_name(model, optimizer, RATE_RATIO).values()) == {1.0}


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    assert by_name(model, optimizer, RATE_RATIO).keys() == {"1.weight", "1.bias"}


def test_a_tower_has_its_own_rate_and_decay_and_the_rest_the_models(model):
    config = OptimizerConfig(
        weight_decay=0.3, image=TowerRateConfig(learning_rate_ratio=0.1, weight_decay=0.0)
    )
    optimizer = build_optimizer(model, config)
    rates = by_name(model, optimizer, RATE_RATIO)
    decays = by_name(model, optimizer, "weight_decay")
    for name, parameter in model.named_parameters():
        in_tower = name.startswith("encoder.visual.")
        assert rates[name] == (0.1 if in_tower else 1.0), name
        assert decays[name] == (0.0 if in_tower or parameter.ndim < 2 else 0.3), name


def test_layer_decay_lowers_the_rate_stage_by_stage_towards_the_input(model):
    config = OptimizerConfig(text=TowerRateConfig(learning_rate_ratio=0.5, layer_decay=0.75))
    rates = by_name(model, build_optimizer(model, config), RATE_RATIO)
    # By hand: the projection, the one block with the last norm, the embeddings.
    stages = {
        0.5: ("text_projection",),
        0.5 * 0.75: ("transformer.", "ln_final."),
        0.5 * 0.75**2: ("token_embedding.", "positional_embedding"),
    }
    expected = {
        name: next(
            (
                ratio
                for ratio, starts in stages.items()
                if name.startswith(tuple(f"encoder.text.{start}" for start in starts))
            ),
            1.0,
        )
        for name, _ in model.named_parameters()
    }
    assert rates == expected
    assert len(set(expected.values())) == 4


def test_what_both_towers_share_gets_the_lower_rate_and_decay():
    multiway = MultiwayConfig(image_size=12, patch_size=4, width=8, heads=2, layers=2, vl_layers=2)
    encoder = build_from_config(ModelConfig(multiway=multiway), tiny_tokenizer())
    model = PretrainingModel(encoder)
    config = OptimizerConfig(
        image=TowerRateConfig(learning_rate_ratio=0.1, weight_decay=0.2),
        text=TowerRateConfig(learning_rate_ratio=0.5, weight_decay=0.0),
    )
    optimizer = build_optimizer(model, config)
    rates = by_name(model, optimizer, RATE_RATIO)
    decays = by_name(model, optimizer, "weight_decay")
    images, texts = (
        {each for group in groups for each in group}
        for groups in (encoder.image_groups(), encoder.text_groups())
    )
    assert images & texts
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the mask token
            continue
        sides = [parameter in images, parameter in texts]
        ratio, decay = {(True, False): (0.1, 0.2), (False, True): (0.5, 0.0)}.get(
            tuple(sides), (0.1, 0.0) if all(sides) else (1.0, 0.1)
        )
        assert rates[name] == ratio, name
        assert decays[name] == (decay if parameter.ndim >= 2 else 0.0), name


def test_a_step_is_the_step_of_adamw():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    weight, bias = (p.detach().clone() for p in model.parameters())
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.5, betas=(0.9, 0.98), eps=1e-8)
    optimizer = build_optimizer(model, config)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # After one step Adam's moments cancel: every gradient moves its weight by the rate.
    torch.testing.assert_close(model.weight, weight * (1 - 0.01 * 0.5) - 0.01)
    torch.testing.assert_close(model.bias, bias - 0.01)


def steps_of(config, gradients):
    """The weights of one matrix after optimizer steps with the gradients given."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, bias=False)
    start = model.weight.detach().clone()
    optimizer = build_optimizer(model, config)
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizer.step()
    return start, model.weight.detach()


def test_steps_are_the_steps_of_lion():
    torch.manual_seed(1)
    gradients = [torch.randn(3, 5) for _ in range(4)]
    config = OptimizerConfig(name="lion", learning_rate=0.01, weight_decay=0.5, betas=(0.9, 0.98))
    weight, found = steps_of(config, gradients)
    moment = torch.zeros(3, 5)
    for gradient in gradients:  # Chen et al. 2023, algorithm 2
        update = torch.sign(0.9 * moment + 0.1 * gradient)
        weight = weight - 0.01 * (update + 0.5 * weight)
        moment = 0.98 * moment + 0.02 * gradient
    torch.testing.assert_close(found, weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); expected two in"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; expected a number of at least 0"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm is 0.0; expected more than 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(OptimizerConfig(), **changes)


def test_a_towers_settings_out_of_range_are_refused():
    with pytest.raises(
        ConfigError, match=r"layer_decay 0\.0; expected at least 0, and more than 0"
    ):
        TowerRateConfig(layer_decay=0.0)
    with pytest.raises(
        ConfigError, match=r"weight_decay is -0\.1; expected a number of at least 0"
    ):
        TowerRateConfig(weight_decay=-0.1)
