"""What a run reports reaches its trackers, and no tracker ends a run."""

import json
import shutil

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.tiny_run import STEPS, config
from vlm.errors import ConfigError, TrainingError
from vlm.training.build import build_run
from vlm.training.config import CheckpointConfig, EvaluationConfig
from vlm.training.monitoring import trackers
from vlm.training.monitoring.reporter import METRICS_NAME, read_records
from vlm.training.monitoring.trackers import IDS_NAME


def train(inputs, folder, names, *, resume="never"):
    settings = config(
        inputs, folder, trackers=names, report_every=1, evaluation=EvaluationConfig(every_steps=4),
        checkpoint=CheckpointConfig(every_steps=3, keep=9),
    )  # fmt: skip
    return build_run(settings, resume=resume).fit()


def cut_off(folder):
    """Leave a run as one that was killed before its last checkpoints, after it had reported."""
    for step in (6, 7):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")


def test_tensorboard_has_what_metrics_have_after_a_resume_as_well(inputs, tmp_path):
    train(inputs, tmp_path, ("tensorboard",))
    cut_off(tmp_path)
    train(inputs, tmp_path, ("tensorboard",), resume="auto")
    records = read_records(tmp_path / METRICS_NAME)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, STEPS + 1))
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    for name in ("loss", "gradient_norm/image", "val/zh/mean_recall"):
        found = [(event.step, event.value) for event in board.Scalars(name)]
        expected = [(r["step"], pytest.approx(r[name])) for r in records if name in r]
        assert found == expected


@pytest.mark.slow
def test_wandb_has_the_records_and_goes_on_in_the_same_run(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(inputs, tmp_path, ("wandb",))
    ids = json.loads((tmp_path / IDS_NAME).read_text())
    cut_off(tmp_path)
    train(inputs, tmp_path, ("wandb",), resume="auto")
    assert json.loads((tmp_path / IDS_NAME).read_text()) == ids
    files = list(tmp_path.glob(f"wandb/offline-run-*/run-{ids['wandb']}.wandb"))
    assert len(files) == 2
    first = max(files, key=lambda path: path.stat().st_size).read_bytes()
    assert first.count(b"loss/image-zh") >= STEPS
    assert not (tmp_path / "tensorboard").exists()


class Failing(GeneralTracker):
    name, requires_logging_directory, id = "wandb", False, "x"
    logged = 0
    starts = True

    def __init__(self, **settings):
        super().__init__()

    def start(self):
        if not self.starts:
            raise OSError("no such\n host")

    @property
    def tracker(self):
        return self

    def log(self, values, step=None):
        Failing.logged += 1
        if step == 2:
            raise OSError("the server is away")


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(
    inputs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    monkeypatch.setattr(Failing, "logged", 0)
    assert train(inputs, tmp_path, ("wandb",)).is_dir()
    assert Failing.logged == 2
    shown = capsys.readouterr().err
    assert shown.count("the tracker wandb failed at step 2 and gets no more records") == 1
    assert len(read_records(tmp_path / METRICS_NAME)) > STEPS


def test_a_tracker_that_cannot_be_started_is_one_sentence(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    monkeypatch.setattr(Failing, "starts", False)
    with pytest.raises(TrainingError, match=r"^the tracker wandb cannot be started: no such host$"):
        train(inputs, tmp_path, ("wandb",))


def test_a_package_that_is_missing_is_said_before_the_run_begins(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(ConfigError, match=r"has mlflow, which is not installed; .*pip install mlf"):
        build_run(config(inputs, tmp_path, trackers=("mlflow",)))
    assert not list(tmp_path.iterdir())
