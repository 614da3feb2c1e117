"""What may change when a run goes on: exact in what stays and said, or refused with the reason."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from tests.builders import TINY_MODEL, make_samples, tiny_tokenizer, write_split
from vlm.batches.config import CaptionConfig, DataConfig, MixtureConfig
from vlm.errors import CheckpointError, ConfigError
from vlm.training.build import build_run
from vlm.training.config import (
    AdaptationConfig,
    AveragingConfig,
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    config_as_plain,
    flat_settings,
)
from vlm.training.monitoring.reporter import METRICS_NAME, read_records
from vlm.training.progress import Progress
from vlm.training.saving.checkpoint import Checkpoint
from vlm.training.saving.resuming import MAY_CHANGE, MAY_NOT_CHANGE, compared

STEPS, BATCH = 6, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A data folder and a tokenizer folder."""
    folder = tmp_path_factory.mktemp("inputs")
    write_split(folder / "data", make_samples(24))
    write_split(folder / "data", make_samples(12), split="val")
    tiny_tokenizer().save(folder / "tokenizer")
    return folder


@pytest.fixture
def start(inputs, tmp_path):
    return TrainConfig(
        run_folder=tmp_path / "run",
        tokenizer=inputs / "tokenizer",
        model=TINY_MODEL,
        data=DataConfig(folder=inputs / "data", batch_size=BATCH, workers=0),
        schedule=ScheduleConfig(steps=STEPS, warmup_steps=2),
        evaluation=EvaluationConfig(),
        checkpoint=CheckpointConfig(every_steps=3),
        report_every=1,
    )


def state_at(config, step):
    path = config.run_folder / f"checkpoints/step-{step:08d}/state.json"
    return json.loads(path.read_text())


def uids(run, batches):
    """Return the samples of the next batches of a run."""
    return [uid for batch in run.loader.read(run.data, batches) for uid in batch.uids]


def kept(config, step, tmp_path):
    """Return a checkpoint that has settings alone."""
    return Checkpoint(
        folder=tmp_path, step=step, world_size=1, files=(),
        numbers={"config": json.loads(json.dumps(config_as_plain(config)))},
    )  # fmt: skip


def test_every_setting_has_an_answer():
    names = flat_settings(config_as_plain(TrainConfig()))
    answers = MAY_CHANGE.keys() | MAY_NOT_CHANGE.keys()
    assert not MAY_CHANGE.keys() & MAY_NOT_CHANGE.keys()
    for name in names:
        assert any(f"{name}.".startswith(f"{each}.") for each in answers), (
            f"{name} has no answer in saving/resuming.py: may it change when a run goes on?"
        )
    for each in answers:
        assert any(f"{name}.".startswith(f"{each}.") for name in names), f"{each} is no setting"


def labelled(start, **changes):
    return replace(start.data, mixture=MixtureConfig(batch_by="group"), **changes)


REFUSED = {
    "seed": lambda start: replace(start, seed=3),
    "model.embed_dim": lambda start: replace(start, model=replace(TINY_MODEL, embed_dim=16)),
    "tokenizer": lambda start: replace(start, tokenizer="other"),
    "data.streams": lambda start: replace(start, data=replace(start.data, streams=2)),
    "schedule.steps": lambda start: replace(
        start, schedule=ScheduleConfig(steps=4, warmup_steps=2)
    ),
    "adapt.lora_rank": lambda start: replace(start, adapt=AdaptationConfig(lora_rank=2)),
    "data.mixture.batch_by": lambda start: replace(start, data=labelled(start)),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_would_not_stay_exact_is_refused_with_the_reason(start, tmp_path, named):
    with pytest.raises(ConfigError, match=rf"cannot go on from \S+ with {named} .* \(was .*\): "):
        compared(REFUSED[named](start), kept(start, 5, tmp_path), world_size=1)


def test_a_batch_of_one_label_keeps_its_size(start, tmp_path):
    """The order within a block of samples is made of runs as long as a batch."""
    before = replace(start, data=labelled(start))
    after = replace(start, data=labelled(start, batch_size=8))
    with pytest.raises(ConfigError, match=r"data.batch_size 8 .*where batches are of one group"):
        compared(after, kept(before, 5, tmp_path), world_size=1)


def test_a_setting_that_a_checkpoint_does_not_know_was_at_its_default(start, tmp_path):
    checkpoint = kept(start, 3, tmp_path)
    del checkpoint.numbers["config"]["captions"]
    checkpoint.numbers["config"]["colour"] = "red"
    with pytest.raises(
        ConfigError, match=r"with colour None \(was red\): it is not known what wou"
    ):
        compared(start, checkpoint, world_size=1)
    del checkpoint.numbers["config"]["colour"]
    assert not compared(start, checkpoint, world_size=1).changes
    other = replace(start, captions=CaptionConfig(main_ratio=0.25))
    changes = compared(other, checkpoint, world_size=1).changes
    assert changes == {"captions.main_ratio": (0.5, 0.25)}


def test_a_checkpoint_of_something_else_is_refused(start, tmp_path):
    checkpoint = replace(kept(start, 3, tmp_path), numbers={})
    with pytest.raises(CheckpointError, match="has no settings; expected a run's checkpoint"):
        compared(start, checkpoint, world_size=1)


@pytest.mark.parametrize(("first", "second"), [(4, 8), (8, 4)])
def test_another_batch_size_reads_every_sample_once_and_counts_on(start, capsys, first, second):
    def sized(size, steps):
        data = replace(start.data, batch_size=size)
        schedule = ScheduleConfig(steps=steps, warmup_steps=2)
        return replace(start, data=data, schedule=schedule)

    read = uids(begun := build_run(sized(first, 3)), 3)
    begun.fit()
    capsys.readouterr()
    run = build_run(sized(second, 6), resume="auto")
    assert run.progress == Progress(3, 3 * first)
    read += uids(run, 3)
    in_order = uids(build_run(replace(sized(4, 9), run_folder=start.run_folder / "other")), 9)
    assert sorted(read) == sorted(in_order[: len(read)])
    run.fit()
    said = capsys.readouterr().err
    assert f"from: data.batch_size {second} (was {first}): the data goes on at its place" in said
    assert "from: schedule.steps 6 (was 3): the rates are those of the new schedule" in said
    assert [record["step"] for record in read_records(start.run_folder / METRICS_NAME)] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip
    taken = 3 * first + 3 * second
    assert said.rstrip().endswith(" 00:00 left")  # it counts to where the run ends
    state = state_at(start, 6)
    assert state["progress"]["samples"] == taken
    assert state["data"]["taken"] == {"data": [taken]}


def test_what_has_changed_is_said_and_kept_in_the_history(start, capsys):
    build_run(start).fit()
    longer = replace(
        start,
        schedule=ScheduleConfig(steps=8, warmup_steps=2),
        optimizer=OptimizerConfig(learning_rate=0.5),
        report_every=2,
    )
    capsys.readouterr()
    build_run(longer, resume="auto").fit()
    said = [line for line in capsys.readouterr().err.splitlines() if "from: " in line]
    assert [line.split("from: ")[1] for line in said] == [
        f"{start.run_folder}/checkpoints/step-00000006",
        "optimizer.learning_rate 0.5 (was 0.001): holds from the next step on",
        "report_every 2 (was 1): changes no result",
        "schedule.steps 8 (was 6): the rates are those of the new schedule, as if it had always "
        "been this one",
        "the learning rate 0.000146, now 0.125",
    ]
    config = yaml.safe_load((start.run_folder / "config.yaml").read_text())
    assert config["schedule"]["steps"] == 8
    first, second = yaml.safe_load((start.run_folder / "config_history.yaml").read_text())
    assert (first["step"], first["changes"], first["world_size"]) == (0, {}, 1)
    assert second["step"] == 6
    assert second["changes"]["optimizer.learning_rate"] == {"from": 0.001, "to": 0.5}


def test_a_run_that_is_refused_leaves_its_folder_as_it_was(start):
    build_run(start).fit()
    files = {path: path.stat().st_mtime_ns for path in start.run_folder.rglob("*")}
    with pytest.raises(ConfigError, match=r"seed 3 \(was 0\)"):
        build_run(replace(start, seed=3), resume="auto")
    with pytest.raises(CheckpointError, match="the source 'data' no longer holds"):
        build_run(replace(start, data=replace(start.data, split="val")), resume="auto")
    with pytest.raises(ConfigError, match="holds a run already; go on with it by --resume"):
        build_run(start)
    assert files == {path: path.stat().st_mtime_ns for path in start.run_folder.rglob("*")}


def test_a_run_may_branch_off_from_a_checkpoint_of_another(start, tmp_path):
    build_run(start).fit()
    older = start.run_folder / "checkpoints/step-00000003"
    branch = replace(start, run_folder=tmp_path / "branch", captions=CaptionConfig(main_ratio=1.0))
    build_run(branch, resume=older).fit()
    (entry,) = yaml.safe_load((tmp_path / "branch/config_history.yaml").read_text())
    assert entry["checkpoint"] == str(older)
    assert entry["changes"].keys() == {"run_folder", "captions.main_ratio"}
    with pytest.raises(ConfigError, match=r"holds a run already, and .* is of another one"):
        build_run(branch, resume=older)


def test_auto_starts_where_there_is_nothing(start):
    assert build_run(start, resume="auto").progress == Progress()


def test_an_average_that_joins_starts_from_the_weights_of_the_checkpoint(start):
    build_run(start).fit()
    averaged = replace(start, averaging=AveragingConfig(ema_decay=0.9))
    run = build_run(averaged, resume="auto")
    weights = run.model.state_dict()
    for name, average in run.average.state_dict().items():
        assert torch.equal(average, weights[name]), name
