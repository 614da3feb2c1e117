"""Runs on several sources: what they take of each, and what they go on with."""

import csv
import json
import shutil
from dataclasses import replace

import pytest

from tests.builders import TINY_MODEL, make_sample, make_samples, tiny_tokenizer, write_split
from vlm.batches.config import (
    CaptionConfig,
    DataConfig,
    MixedSourceConfig,
    MixtureConfig,
    PhaseConfig,
)
from vlm.errors import CheckpointError, ConfigError, DataError
from vlm.training.build import build_run
from vlm.training.config import CheckpointConfig, EvaluationConfig, ScheduleConfig, TrainConfig

BATCH = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A data folder, a table of other images with Chinese captions alone, and a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    write_split(folder / "shards", make_samples(12))
    with (folder / "more.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption_zh"])
        for number in range(20, 28):
            sample = make_sample(number)
            (folder / f"{number}.png").write_bytes(sample.image)
            table.writerow([f"{number}.png", sample.captions["zh"][0]])
    tiny_tokenizer().save(folder / "tokenizer")
    return folder


def config(inputs, run_folder, *, steps=6, weights=(3, 1), **data):
    paths = (inputs / "shards", inputs / "more.csv")
    sources = tuple(
        MixedSourceConfig(path=str(path), weight=weight)
        for path, weight in zip(paths, weights, strict=True)
    )
    return TrainConfig(
        run_folder=run_folder,
        tokenizer=inputs / "tokenizer",
        model=TINY_MODEL,
        data=DataConfig(**{"sources": sources, "batch_size": BATCH, "workers": 0} | data),
        schedule=ScheduleConfig(steps=steps, warmup_steps=2),
        evaluation=EvaluationConfig(),
        checkpoint=CheckpointConfig(every_steps=3),
        report_every=1,
    )


def uids_by_step(run):
    """Fit a run; return the uids of every batch that it trained on."""
    found = []

    class Watched(type(run.loader)):
        def read(self, *arguments, **options):
            for batch in super().read(*arguments, **options):
                found.append(batch.uids)
                yield batch

    loader = run.loader
    watched = Watched(loader.examples, loader.order, loader.tokenizer, loader.workers, loader.masks)
    replace(run, loader=watched).fit()
    return found


def stop(run, *, step):
    """Fit a run, and end it after a step, as something else may."""

    def end(encoder):
        raise KeyboardInterrupt

    settings = replace(run.config, evaluation=EvaluationConfig(every_steps=step))
    with pytest.raises(KeyboardInterrupt):
        replace(run, config=settings, evaluate=end).fit()


def of_table(uids):
    return [uid for uid in uids if uid.startswith("more.csv")]


def test_every_batch_takes_of_each_source_by_its_weight(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path))
    assert "12 samples in 3 shards (75.0%); " in run.describe()
    batches = uids_by_step(run)
    assert [len(of_table(batch)) for batch in batches] == [1] * 6


def test_a_single_source_may_be_a_table(inputs, tmp_path):
    settings = config(inputs, tmp_path, sources=(), folder=inputs / "more.csv")
    settings = replace(settings, captions=CaptionConfig(languages=("zh",)))
    batches = uids_by_step(build_run(settings))
    assert all(of_table(batch) == list(batch) for batch in batches)
    assert len({uid for batch in batches[:2] for uid in batch}) == 8  # one epoch


def test_without_weights_a_source_has_its_size_as_share(inputs, tmp_path):
    batches = uids_by_step(build_run(config(inputs, tmp_path, weights=(None, None), steps=5)))
    assert sum(len(of_table(batch)) for batch in batches) == 8  # of 20 samples of an epoch


def test_a_schedule_changes_the_weights_at_its_steps(inputs, tmp_path):
    phases = (
        PhaseConfig(until=2, weights={"shards": 1}),
        PhaseConfig(until=4, weights={"more.csv": 1, "shards": 1}),
        PhaseConfig(weights={"more.csv": 1}),
    )
    mixture = MixtureConfig(schedule=phases)
    batches = uids_by_step(build_run(config(inputs, tmp_path, mixture=mixture)))
    assert [len(of_table(batch)) for batch in batches] == [0, 0, 2, 2, 4, 4]


def test_a_mixture_may_change_half_way(inputs, tmp_path):
    whole = uids_by_step(build_run(config(inputs, tmp_path / "whole", steps=9)))
    first = config(inputs, tmp_path / "half", steps=9)
    stop(build_run(first), step=5)
    (state,) = (tmp_path / "half/checkpoints").glob("*/state.json")
    assert json.loads(state.read_text())["data"]["taken"] == {"shards": [9], "more.csv": [3]}
    second = replace(config(inputs, tmp_path / "half", steps=9, weights=(1, 1)))
    changed = uids_by_step(build_run(second, resume="auto"))
    assert [len(of_table(batch)) for batch in changed] == [2] * 6
    # Each source goes on where it was: a table's epoch has 8 samples.
    in_order = [uid for batch in whole for uid in of_table(batch)]
    seen = in_order[:3] + [uid for batch in changed for uid in of_table(batch)]
    assert sorted(seen[:8]) == sorted(set(seen))


def test_a_source_that_has_changed_is_refused_when_a_run_goes_on_and_read_under_another_name(
    inputs, tmp_path
):
    shutil.copytree(inputs, tmp_path / "inputs")
    settings = config(tmp_path / "inputs", tmp_path / "run", steps=9)
    stop(build_run(settings), step=5)
    table = tmp_path / "inputs/more.csv"
    table.write_text(table.read_text(encoding="utf-8") + "20.png,一只大猫\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"source 'more\.csv' no longer holds what the run"):
        build_run(settings, resume="auto")
    shards, more = settings.data.sources
    renamed = replace(settings.data, sources=(shards, replace(more, name="longer")))
    batches = uids_by_step(build_run(replace(settings, data=renamed), resume="auto"))
    assert len(batches) == 6


def test_a_label_to_batch_by_that_no_sample_has_is_refused(inputs, tmp_path):
    mixture = MixtureConfig(batch_by="cluster")
    with pytest.raises(ConfigError, match="batch_by is 'cluster', a label that no sample has"):
        build_run(config(inputs, tmp_path, mixture=mixture))


def test_runs_go_on_with_the_streams_that_they_began_with(inputs, tmp_path):
    settings = config(inputs, tmp_path / "whole", streams=2, steps=9)
    whole = uids_by_step(build_run(settings))
    halved = replace(settings, run_folder=tmp_path / "half")
    stop(build_run(halved), step=4)
    resumed = build_run(halved, resume="auto")
    assert resumed.data.streams == 2
    assert uids_by_step(resumed) == whole[3:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"sources": (MixedSourceConfig(path="a/x"), MixedSourceConfig(path="b/x"))},
            "two sources are called 'x'; expected a `name` for each",
        ),
        (
            {"sources": (MixedSourceConfig(path="a", weight=1), MixedSourceConfig(path="b"))},
            "some sources have a weight; expected one for each or for none",
        ),
        (
            {"mixture": MixtureConfig(schedule=(PhaseConfig(weights={"emoji": 1}),))},
            "weights of emoji; expected those of data",
        ),
        ({"skip_batches": ((5, 3),)}, "expected pairs of a first number from 0 and a last one"),
        ({"allowed_share": 1.5}, r"allowed_share is 1.5; expected a ratio in \[0, 1\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**data)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([(5, 1), (None, 1), (9, 1)], r"at \[5, None, 9\]; expected steps that increase, and null"),
        ([(5, 1), (4, 1), (None, 1)], "expected steps that increase"),
        ([(5, 1)], "expected steps that increase, and null for the last"),
        ([(None, 0)], "expected none below 0, and one above"),
        ([(None, -1)], "expected none below 0, and one above"),
    ],
)
def test_a_schedule_that_is_none_is_refused(phases, message):
    with pytest.raises(ConfigError, match=message):
        MixtureConfig(
            schedule=tuple(PhaseConfig(until=end, weights={"a": weight}) for end, weight in phases)
        )


@pytest.mark.parametrize("sources", [True, False], ids=["sources", "one folder"])
def test_a_run_on_data_without_a_split_to_score_says_so_and_trains(inputs, tmp_path, sources):
    settings = replace(config(inputs, tmp_path), evaluation=EvaluationConfig(every_steps=3))
    if not sources:
        own = DataConfig(folder=inputs / "shards", batch_size=settings.data.batch_size)
        settings = replace(settings, data=own)
    run = build_run(settings)
    assert "\nscored: nothing, as the data has no split 'val'; evaluation.folder names" in (
        run.describe()
    )
    assert (run.fit() / "vlm.json").is_file()


def test_a_split_to_score_that_is_asked_for_must_be_there(inputs, tmp_path):
    own = DataConfig(folder=inputs / "shards", batch_size=6)
    asked = EvaluationConfig(every_steps=3, split="best")
    with pytest.raises(DataError, match="has no split 'best'; its splits are train"):
        build_run(replace(config(inputs, tmp_path), data=own, evaluation=asked))


def test_sources_may_be_paths_alone(inputs, tmp_path):
    paths = (str(inputs / "shards"), str(inputs / "more.csv"))
    run = build_run(config(inputs, tmp_path, sources=paths))
    assert "12 samples in 3 shards (60.0%); " in run.describe()
    with pytest.raises(ConfigError, match=r"folder is \[a,b\]; expected `sources` for several"):
        DataConfig(folder="[a,b]")


def replay(inputs, **languages):
    sources = tuple(
        MixedSourceConfig(path=str(inputs / "shards"), name=name, languages=read)
        for name, read in languages.items()
    )
    return {"sources": sources}


def test_each_source_is_read_in_its_own_languages(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path, **replay(inputs, new=("zh",), old=("en",))))
    batch = next(run.loader.read(run.data, 1))
    own = {name: set(rows.tolist()) for name, rows in batch.text_rows.items()}
    assert own["zh"] | own["en"] == set(range(BATCH))
    assert not own["zh"] & own["en"]


def test_second_captions_are_read_in_the_languages_of_a_source_alone(inputs, tmp_path):
    settings = config(inputs, tmp_path, **replay(inputs, new=("zh",), old=("zh", "en")))
    run = build_run(replace(settings, captions=CaptionConfig(second=True)))
    batch = next(run.loader.read(run.data, 1))
    own = {name: set(rows.tolist()) for name, rows in batch.text_rows.items()}
    assert own["zh"] == own["zh second"] == set(range(BATCH))
    assert own["en"] == own["en second"] < own["zh"]


def test_languages_of_sources_that_do_not_fit_the_run_are_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"read in fr, which captions.languages zh, en lacks"):
        build_run(config(inputs, tmp_path, **replay(inputs, new=("zh",), old=("fr",))))
    with pytest.raises(ConfigError, match=r"captions.languages has en, but .* in zh only"):
        build_run(config(inputs, tmp_path, **replay(inputs, new=("zh",), old=("zh",))))
