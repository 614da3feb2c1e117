"""Signals end a run after the step at hand, with all that it has learnt."""

import os
import signal

import pytest

from tests.support.faults import called, with_fault
from tests.support.tiny_run import config
from vlm.errors import InterruptedRunError
from vlm.training.build import build_run
from vlm.training.config import CheckpointConfig, EvaluationConfig

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The weights of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return (build_run(config(inputs, folder)).fit() / WEIGHTS).read_bytes()


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 4])
def test_a_signal_loses_no_step(inputs, tmp_path, whole, asked, at):
    settings = config(inputs, tmp_path, checkpoint=CheckpointConfig(every_steps=0))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    run = with_fault(build_run(settings), called(lambda: os.kill(os.getpid(), asked)), {at})
    with pytest.raises(
        InterruptedRunError,
        match=rf"by {asked.name} after step {at} of 7; --resume goes on from .*step-0000000{at}$",
    ):
        run.fit()
    assert {number: signal.getsignal(number) for number in before} == before
    resumed = build_run(settings, resume="auto")
    assert resumed.progress.step == at
    assert (resumed.fit() / WEIGHTS).read_bytes() == whole


def test_a_signal_is_answered_before_an_evaluation(inputs, tmp_path):
    settings = config(inputs, tmp_path, evaluation=EvaluationConfig(every_steps=1))
    run = with_fault(build_run(settings), called(lambda: os.kill(os.getpid(), signal.SIGTERM)), {1})
    with pytest.raises(InterruptedRunError):
        run.fit()
    assert "val/" not in (tmp_path / "metrics.jsonl").read_text()
