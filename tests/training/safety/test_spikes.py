"""Spikes are skipped by the rule's own definition, and change neither resuming nor what follows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.faults import bad_gradient, bad_loss, with_fault
from tests.support.tiny_run import config, losses
from vlm.batches.config import DataConfig
from vlm.errors import ConfigError, TrainingError
from vlm.training.build import build_run
from vlm.training.config import CheckpointConfig, EvaluationConfig, GuardConfig, ScheduleConfig
from vlm.training.monitoring.reporter import read_records
from vlm.training.safety.guard import SKIPPED_STEPS_NAME
from vlm.training.safety.spikes import SpikeRule

WEIGHTS = "open_clip_model.safetensors"


def judged(values, *, sigmas, window):
    """The definition, in numpy: which steps are spikes, and the limits of each."""
    taken, spikes = [], []
    for value in values:
        last = np.array(taken[-window:])
        limit = math.inf
        if len(taken) >= window // 2:
            limit = last.mean() + sigmas * last.std(ddof=1)
        spikes.append(value > limit)
        if math.isfinite(value):
            taken.append(min(value, limit))
    return spikes


def test_the_rule_is_its_definition():
    generator = np.random.default_rng(3)
    values = generator.normal(3.0, 0.1, 200)
    values[[20, 77, 78, 150]] = [9.0, 5.0, 5.0, math.nan]
    values[100:] += 0.8  # another level
    rule, found = SpikeRule(4.0, 16, torch.device("cpu")), []
    for value in values:
        measured, limits = torch.tensor([value, 1.0], dtype=torch.float32), rule.limits()
        found.append(bool((measured > limits).any()))
        rule.take(measured, limits)
    expected = judged(values, sigmas=4.0, window=16)
    assert found == expected
    assert [k for k in (20, 77, 78) if found[k]] == [20, 77, 78]
    assert found[100]
    assert not any(found[110:150])  # the new level is followed


def test_the_rule_goes_on_as_if_it_had_not_been_saved():
    steps = torch.linspace(1, 2, 40)
    whole, first = (SpikeRule(3.0, 8, torch.device("cpu")) for _ in range(2))
    for rule, values in ((whole, steps), (first, steps[:21])):
        for value in values:
            rule.take(torch.stack([value, 1 / value]), rule.limits())
    resumed = SpikeRule(3.0, 8, torch.device("cpu"))
    resumed.load_state_dict(first.state_dict())
    for value in steps[21:]:
        resumed.take(torch.stack([value, 1 / value]), resumed.limits())
    assert torch.equal(resumed.limits(), whole.limits())
    assert resumed.state_dict() == whole.state_dict()


def spiky(inputs, folder, **changes):
    settings = {
        "schedule": ScheduleConfig(steps=14, warmup_steps=2),
        "guard": GuardConfig(spike_sigmas=6.0, spike_window=8),
        "evaluation": EvaluationConfig(),
        "report_every": 1,
    }
    return config(inputs, folder, **(settings | changes))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(bad_loss(1e4), "the loss is 1e+04, above the"), (bad_gradient(1e6), "norm is 1e+06, above")],
    ids=["loss", "gradient"],
)
def test_a_step_far_above_the_last_ones_is_skipped(inputs, tmp_path, fault, reason):
    run = with_fault(build_run(spiky(inputs, tmp_path)), fault, {9})
    run.fit()
    records = read_records(tmp_path / SKIPPED_STEPS_NAME)
    assert [record["step"] for record in records] == [9]
    assert reason in records[0]["reason"]
    assert losses(tmp_path, "skipped_steps")[14] == 1


def test_going_on_after_a_spike_is_bitwise_the_same(inputs, tmp_path):
    left = []
    for name, stops in (("whole", False), ("halved", True)):
        settings = spiky(inputs, tmp_path / name, checkpoint=CheckpointConfig(every_steps=10))
        run = with_fault(build_run(settings), bad_loss(1e4), {9})
        if stops:
            end = EvaluationConfig(every_steps=10)
            run = replace(run, config=replace(settings, evaluation=end), evaluate=_end)
            with pytest.raises(KeyboardInterrupt):
                run.fit()
            run = build_run(settings, resume="auto")
            assert run.progress.step == 10
            assert run.guard.skipped == 1
        left.append(((run.fit() / WEIGHTS).read_bytes(), run.guard.state_dict()))
    assert left[0] == left[1]


def _end(encoder):
    raise KeyboardInterrupt


def test_a_run_that_ended_over_a_range_of_batches_goes_on_past_it(inputs, tmp_path):
    settings = spiky(
        inputs,
        tmp_path,
        guard=GuardConfig(max_skipped_in_a_row=2),
        checkpoint=CheckpointConfig(every_steps=3),
    )
    spoilt = {7, 8}  # of batches 6 and 7, counted from 0
    with pytest.raises(
        TrainingError, match=r"2 steps in a row .*--resume goes on from .*-00000006"
    ):
        with_fault(build_run(settings), bad_loss(), spoilt).fit()
    data = DataConfig(folder=inputs / "data", batch_size=4, workers=0, skip_batches=((6, 7),))
    run = build_run(replace(settings, data=data), resume="auto")
    expected = [
        batch.uids
        for batch in build_run(replace(settings, run_folder=tmp_path / "x")).loader.read(
            run.loader.order.start(), 10
        )
    ]
    read = [batch.uids for batch in run.loader.read(run.data, 2)]
    assert read == expected[8:10]
    run.fit()
    assert losses(tmp_path, "skipped_steps")[14] == 0  # of the course that goes on


@pytest.mark.parametrize("wrong", [{"spike_sigmas": 0.0}, {"spike_window": 3}])
def test_a_rule_without_a_meaning_is_refused(wrong):
    with pytest.raises(ConfigError, match="expected null or more than 0, and at least 4"):
        GuardConfig(**wrong)
