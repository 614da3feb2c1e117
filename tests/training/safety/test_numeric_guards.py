"""The bound of the logit scale in every type, and the ratio of the embeddings' gradients."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from tests.builders import tiny_model, tiny_tokenizer
from tests.support.tiny_run import config
from vlm.errors import ConfigError
from vlm.models.encoder import clamp_log_scale
from vlm.training.build import build_run
from vlm.training.config import CheckpointConfig, EvaluationConfig, OptimizerConfig, ScheduleConfig
from vlm.training.optimization.optimizer import shrink_embedding_gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_that_is_clamped_is_at_most_100_in_every_type(dtype):
    log_scale = torch.tensor(10.0, dtype=dtype)
    clamp_log_scale(log_scale)
    assert 98 < math.exp(log_scale.item()) <= 100


@pytest.fixture
def any_precision():
    """Let a run have another precision than the runs of this process before and after it."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_scale_stays_in_its_bound_after_every_step_and_resume(inputs, tmp_path, precision):
    settings = config(
        inputs,
        tmp_path,
        precision=precision,
        optimizer=OptimizerConfig(learning_rate=5.0),  # throws it out of its bound at once
        evaluation=EvaluationConfig(),
        checkpoint=CheckpointConfig(every_steps=2),
    )
    run, found = build_run(settings), []

    def push_and_note(run):
        def step(parts):
            found.append(run.start.model.logit_scales["main"].item())
            output = run.step(parts)
            parameter = run.start.model.log_logit_scale
            parameter.grad = torch.full_like(parameter, -1.0)
            return output

        return step

    replace(run, step=push_and_note(run)).fit()
    longer = replace(settings, schedule=ScheduleConfig(steps=9, warmup_steps=2))
    resumed = build_run(longer, resume="auto")
    replace(resumed, step=push_and_note(resumed)).fit()
    assert len(found) == 9
    assert all(scale <= 100 for scale in found)
    assert max(found) > 99  # and it was pushed


def test_the_gradient_of_embeddings_alone_is_multiplied_by_the_ratio():
    encoder = tiny_model(tiny_tokenizer())
    embeddings = {*encoder.image_groups()[0], *encoder.text_groups()[0]}
    assert any(each is encoder.token_embedding.weight for each in embeddings)
    assert any(isinstance(each, nn.Parameter) and each.ndim == 4 for each in embeddings)
    for parameter in encoder.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {parameter: parameter.grad.clone() for parameter in encoder.parameters()}
    shrink_embedding_gradients(encoder, 0.1)
    for parameter, gradient in before.items():
        assert torch.equal(parameter.grad, gradient * 0.1 if parameter in embeddings else gradient)


def test_the_ratio_changes_nothing_of_the_forward_pass_and_may_change_when_going_on(
    inputs, tmp_path
):
    plain = config(inputs, tmp_path, evaluation=EvaluationConfig())
    losses = []
    for ratio in (1.0, 0.1):
        settings = OptimizerConfig(embedding_gradient_ratio=ratio)
        run = build_run(config(inputs, tmp_path / "new", optimizer=settings))
        losses.append(run.train_step(next(run.loader.read(run.data, 1)), 0).loss)
    assert torch.equal(*losses)
    build_run(plain).fit()
    smaller = replace(plain, optimizer=OptimizerConfig(embedding_gradient_ratio=0.5))
    longer = replace(smaller, schedule=ScheduleConfig(steps=9, warmup_steps=2))
    assert "embedding_gradient_ratio 0.5 (was 1.0)" in build_run(longer, resume="auto").describe()


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_a_ratio_out_of_its_range_is_refused(ratio):
    with pytest.raises(ConfigError, match="expected more than 0, and at most 1"):
        OptimizerConfig(embedding_gradient_ratio=ratio)
