"""What ends a run from outside has a name and a way on, and ends in time: real processes."""

import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace

import psutil
import pytest

from tests.support.faults import called, ended, start_training, wait_for, with_fault
from tests.support.tiny_run import config, losses
from vlm.batches.config import DataConfig, MixedSourceConfig
from vlm.errors import VlmError
from vlm.training.build import build_run
from vlm.training.config import CheckpointConfig, EvaluationConfig

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

BATCH = 4


def settings(inputs, folder, *, workers=0, **changes):
    data = DataConfig(
        folder=inputs / "data", batch_size=BATCH, workers=workers, stall_s=changes.pop("stall_s", 3)
    )
    plain = {"data": data, "evaluation": EvaluationConfig(), "report_every": 1}
    return config(inputs, folder / "run", **(plain | changes))


def last_line(err):
    return err.read_text().replace("\r", "\n").rstrip("\n").split("\n")[-1]


def of_workers(send):
    """What sends a signal to the data workers of this process."""

    def act():
        for child in multiprocessing.active_children():
            os.kill(child.pid, send)

    return act


def no_fault(run):
    return run


def kill_rank_1(run):
    return with_fault(run, called(lambda: os.kill(os.getpid(), signal.SIGKILL)), {4}, rank=1)


def stop_workers(run):
    return with_fault(run, called(of_workers(signal.SIGSTOP)), {2})


def kill_workers(run):
    return with_fault(run, called(of_workers(signal.SIGKILL)), {2})


def rank_1_stands_still(run):
    return with_fault(run, called(lambda: time.sleep(100)), {3}, rank=1)


def slow_steps(run):
    return with_fault(run, called(lambda: time.sleep(0.1)), range(1000))


def stands_still_before_training(run):
    run.config.run_folder.mkdir(exist_ok=True)
    (run.config.run_folder / "built").touch()
    time.sleep(100)
    return run


def asked_while_it_scores(run):
    def evaluate(encoder):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        return run.evaluate(encoder)

    return replace(run, evaluate=evaluate)


def test_a_rank_that_dies_is_named_by_the_other(inputs, tmp_path):
    err = tmp_path / "err"
    saved = CheckpointConfig(every_steps=2)
    ranks = start_training(
        settings(inputs, tmp_path, checkpoint=saved), kill_rank_1, err, processes=2
    )
    assert ended(ranks) == [2, -signal.SIGKILL]
    assert "vlm: rank 1 no longer answers after step 3, as rank 0 has found" in last_line(err)
    assert "--resume goes on from" in last_line(err)
    assert "step-00000002" in last_line(err)


def test_a_data_worker_that_stands_still_is_named(inputs, tmp_path):
    err = tmp_path / "err"
    ranks = start_training(settings(inputs, tmp_path, workers=1), stop_workers, err)
    assert ended(ranks) == [2]
    assert "vlm: data worker 0 (process " in last_line(err)
    assert "has done nothing for" in last_line(err)
    assert "; nothing is saved yet)" in last_line(err)


def test_a_data_worker_that_dies_is_named(inputs, tmp_path):
    err = tmp_path / "err"
    ranks = start_training(settings(inputs, tmp_path, workers=1), kill_workers, err)
    assert ended(ranks) == [2]
    assert re.search(r"vlm: (a data|data) worker .*(killed by signal|exit code -9)", last_line(err))


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_one_rank_that_is_asked_to_end_ends_all_and_leaves_no_worker(inputs, tmp_path, asked):
    err = tmp_path / "err"
    checkpoints = tmp_path / "run" / "checkpoints"
    saved = CheckpointConfig(every_steps=2)
    ranks = start_training(
        settings(inputs, tmp_path, workers=1, checkpoint=saved), slow_steps, err, processes=2
    )
    wait_for(lambda: checkpoints.exists() and any(checkpoints.glob("step-*")))
    workers = [child for rank in ranks for child in psutil.Process(rank.pid).children()]
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(asked)  # as a scheduler does, which signals all that it started
    os.kill(ranks[1].pid, asked)
    assert ended(ranks) == [0, 130 if asked == signal.SIGINT else 0]
    assert not any(worker.is_running() for worker in workers)
    text = err.read_text()
    assert text.count("vlm: ") == 1
    assert "vlm: interrupted by a signal to another rank after step " in last_line(err)
    assert "--resume goes on from" in last_line(err)
    assert "Traceback" not in text


def test_a_second_signal_ends_a_rank_that_waits_for_another(inputs, tmp_path):
    err = tmp_path / "err"
    ranks = start_training(settings(inputs, tmp_path), rank_1_stands_still, err, processes=2)
    wait_for(lambda: losses(tmp_path / "run").get(2))
    time.sleep(2)  # by now rank 0 waits
    os.kill(ranks[0].pid, signal.SIGTERM)
    time.sleep(1.2)
    assert ranks[0].exitcode is None
    os.kill(ranks[0].pid, signal.SIGTERM)
    ranks[0].join(5)
    assert ranks[0].exitcode == 128 + signal.SIGTERM
    ended(ranks, 0)


def test_a_signal_before_training_ends_with_a_line(inputs, tmp_path):
    err = tmp_path / "err"
    ranks = start_training(settings(inputs, tmp_path), stands_still_before_training, err)
    wait_for((tmp_path / "run" / "built").exists)
    os.kill(ranks[0].pid, signal.SIGTERM)
    assert ended(ranks, 10) == [0]
    expected = "vlm: interrupted by SIGTERM outside training, with nothing to save"
    assert last_line(err) == expected


def test_a_signal_while_data_is_waited_for_ends_at_once_with_a_checkpoint(inputs, tmp_path):
    err = tmp_path / "err"
    ranks = start_training(settings(inputs, tmp_path, workers=1, stall_s=100), stop_workers, err)
    wait_for(lambda: losses(tmp_path / "run"))
    time.sleep(3)
    os.kill(ranks[0].pid, signal.SIGUSR1)
    assert ended(ranks, 20) == [0]
    assert re.search(r"by SIGUSR1 after step [1-4] of 7; --resume goes on from", last_line(err))


def test_a_signal_cuts_an_evaluation_short_and_loses_no_step(inputs, tmp_path):
    err = tmp_path / "err"
    scored = EvaluationConfig(every_steps=3)
    ranks = start_training(
        settings(inputs, tmp_path, evaluation=scored), asked_while_it_scores, err
    )
    assert ended(ranks) == [0]
    assert "by SIGTERM after step 3 of 7; --resume goes on from" in last_line(err)
    assert "val/" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_workers_do_not_outlive_a_trainer_that_is_killed(inputs, tmp_path):
    err = tmp_path / "err"
    ranks = start_training(settings(inputs, tmp_path, workers=2), slow_steps, err)
    wait_for(lambda: losses(tmp_path / "run"))
    workers = psutil.Process(ranks[0].pid).children()
    assert len(workers) == 2
    ranks[0].kill()
    psutil.wait_procs(workers, timeout=3)
    assert not any(worker.is_running() for worker in workers)


def test_a_source_of_which_nothing_is_left_is_refused(inputs, tmp_path):
    source = MixedSourceConfig(path=str(inputs / "data"), split="train", where=("concept=none",))
    nothing = replace(settings(inputs, tmp_path).data, folder="data/emoji", sources=(source,))
    with pytest.raises(VlmError, match="none"):
        build_run(settings(inputs, tmp_path, data=nothing))


def test_an_empty_folder_is_refused(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    nothing = replace(settings(inputs, tmp_path).data, folder=tmp_path / "empty")
    with pytest.raises(VlmError, match="empty"):
        build_run(settings(inputs, tmp_path, data=nothing))


def test_more_workers_than_shards_read_all_the_same(inputs, tmp_path):
    err = tmp_path / "err"
    ranks = start_training(settings(inputs, tmp_path, workers=5), no_fault, err)  # of 3 shards
    assert ended(ranks) == [0]
    assert (tmp_path / "run" / "bundle").is_dir()
