import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.builders import tiny_model, tiny_tokenizer
from vlm.errors import ConfigError
from vlm.training.config import OptimizerConfig, ScheduleConfig
from vlm.training.optimizer import build_optimizer
from vlm.training.schedule import learning_rate_factor


def test_only_matrices_and_kernels_decay():
    model = tiny_model(tiny_tokenizer())
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        assert decay.pop(id(parameter)) == (0.3 if parameter.ndim >= 2 else 0.0), name
    assert not decay


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimizerConfig())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model[1].parameters()}


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


def test_the_rate_rises_in_a_line_then_falls_along_half_a_cosine():
    config = ScheduleConfig(steps=14, warmup_steps=4, final_ratio=0.2)
    factors = [learning_rate_factor(step, config) for step in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[9] == pytest.approx(0.6)
    assert all(after < before for before, after in pairwise(factors[4:]))
    assert factors[-1] == pytest.approx(0.2 + 0.8 * (1 + math.cos(0.9 * math.pi)) / 2)


def test_without_warm_up_the_run_starts_at_the_highest_rate():
    assert learning_rate_factor(0, ScheduleConfig(steps=5, warmup_steps=0)) == 1.0


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warm_up_that_does_not_fit_is_refused_with_both_numbers(warmup):
    with pytest.raises(ConfigError, match=f"warmup_steps is {warmup} and steps 10"):
        ScheduleConfig(steps=10, warmup_steps=warmup)
