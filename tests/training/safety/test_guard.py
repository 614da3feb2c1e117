"""Updates that must not happen: all ranks leave them out, and the run goes on or ends."""

import math

import pytest
import torch
from torch import nn

from tests.support.faults import bad_gradient, bad_images, bad_loss, with_fault
from tests.support.processes import as_launched, run_in_processes
from tests.support.tiny_run import STEPS, config, losses
from vlm.distributed.groups import SINGLE
from vlm.errors import TrainingError
from vlm.training.build import build_run
from vlm.training.config import (
    AveragingConfig,
    CheckpointConfig,
    EvaluationConfig,
    GuardConfig,
    OptimizerConfig,
)
from vlm.training.monitoring.reporter import read_records
from vlm.training.safety.guard import SKIPPED_STEPS_NAME, Guard

FAULTS = {
    "images of NaN": (bad_images(math.nan), "the loss is nan"),
    "one gradient of NaN": (bad_gradient(math.nan), "the gradient's norm is nan"),
    "one gradient of inf": (bad_gradient(math.inf, 7), "the gradient's norm is inf"),
    "a loss of inf": (bad_loss(math.inf), "the loss is inf"),
}


def state_of(run):
    """What a run would save of its weights, moments, counts and buffers."""
    return {
        f"{part}/{name}": value.detach().clone()
        for part, state in run.state.items()
        for name, value in state.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def plain(inputs, folder, **changes):
    """A run that is not scored."""
    return config(
        inputs, folder, **({"evaluation": EvaluationConfig(), "report_every": 1} | changes)
    )


@pytest.mark.parametrize(
    ("named", "optimizer"), [*((each, "adamw") for each in FAULTS), (*FAULTS, "lion")[-2:]]
)
def test_a_bad_step_changes_neither_weights_nor_moments_nor_running_statistics(
    inputs, tmp_path, named, optimizer
):
    fault, reason = FAULTS[named]
    averaging = AveragingConfig(ema_decay=0.9)
    settings = {"optimizer": OptimizerConfig(name=optimizer), "averaging": averaging}
    run = build_run(plain(inputs, tmp_path, **settings))
    batches = run.loader.read(run.data, 3)
    run.train_step(next(batches), 0)
    before = state_of(run)
    assert {name.split("/")[0] for name in before} == {"model", "optimizer", "ema"}
    assert any("running_mean" in name for name in before)
    with_fault(run, fault, {1}).train_step(next(batches), 1)
    assert state_of(run).keys() == before.keys()
    for name, value in state_of(run).items():
        assert torch.equal(value, before[name]), name
    first, second = run.guard.verdicts(wait=True)
    assert (first.skipped, second.skipped) == (False, True)
    assert second.reason == reason
    run.train_step(next(batches), 2)
    assert not torch.equal(
        state_of(run)["model/encoder.log_logit_scale"], before["model/encoder.log_logit_scale"]
    )


def test_a_run_goes_on_after_a_bad_step_counts_it_and_lists_its_samples(inputs, tmp_path):
    run = build_run(plain(inputs, tmp_path))
    expected = [batch.uids for batch in run.loader.read(run.data, STEPS)]
    with_fault(run, bad_images(math.nan), {3, 6}).fit()
    records = read_records(tmp_path / SKIPPED_STEPS_NAME)
    assert [record["step"] for record in records] == [3, 6]
    assert [record["uids"] for record in records] == [list(expected[2]), list(expected[5])]
    assert losses(tmp_path, "skipped_steps") == dict(enumerate([0, 0, 1, 1, 1, 2, 2], start=1))
    assert sorted(losses(tmp_path)) == [1, 2, 4, 5, 7]


def test_too_many_bad_steps_in_a_row_end_the_run(inputs, tmp_path):
    guard = GuardConfig(max_skipped_in_a_row=2)
    run = build_run(
        plain(inputs, tmp_path, guard=guard, checkpoint=CheckpointConfig(every_steps=1))
    )
    message = r"^the updates of 2 steps in a row were skipped.*at step 6 the loss is nan.*sample-"
    with pytest.raises(TrainingError, match=message):
        with_fault(run, bad_images(math.nan), {3, 5, 6}).fit()
    assert max(losses(tmp_path, "skipped_steps")) == 5


def _one_bad_rank(rank, inputs, folder):
    as_launched(rank, 2)
    run = build_run(plain(inputs, folder))
    first, second = run.loader.read(run.data, 2)
    run.train_step(first, 0)
    before = state_of(run)
    with_fault(run, bad_loss(), {1}, rank=1).train_step(second, 1)
    assert all(torch.equal(value, before[name]) for name, value in state_of(run).items())
    return [verdict.skipped for verdict in run.guard.verdicts(wait=True)]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_bad_loss_on_one_rank_is_skipped_on_all(inputs, tmp_path):
    assert run_in_processes(_one_bad_rank, 2, inputs, tmp_path) == [[False, True]] * 2


def test_an_overflow_in_the_search_for_a_scale_is_skipped_and_is_no_alarm():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = Guard(GuardConfig(max_skipped_in_a_row=2), model, SINGLE)
    before = model.weight.detach().clone()
    losses_of = {"searching": 1.0, "found": 1.0, "the loss itself": math.nan}
    for step, (case, loss) in enumerate(losses_of.items()):
        model.weight.grad = torch.full((2, 2), math.inf)
        guard.begin()
        shared = guard.share(torch.tensor(loss), stop=False)
        searching = torch.tensor(case != "found")
        norm = torch.tensor(math.inf)
        guard.update(
            optimizer, step=step, uids=(), shared=shared, gradient_norm=norm, may_overflow=searching
        )
    assert torch.equal(model.weight, before)
    verdicts = guard.verdicts(wait=True)
    kinds = [(each.overflow, each.skipped) for each in (next(verdicts) for _ in range(3))]
    assert kinds == [(True, False), (False, True), (False, True)]
    with pytest.raises(TrainingError, match="2 steps in a row"):
        next(verdicts)
    assert (guard.overflows, guard.skipped) == (1, 2)
