"""A run goes on from a bundle: its model, its tokenizer, its images; new rows alone at first."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from tests.builders import make_samples, tiny_bundle, write_split
from vlm.batches.config import CaptionConfig, DataConfig
from vlm.bundle import load_bundle
from vlm.errors import ConfigError
from vlm.images.config import PreprocessConfig
from vlm.models.config import GrowthConfig, ModelConfig
from vlm.text.extension import extend
from vlm.training.build import build_run
from vlm.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from vlm.training.monitoring.reporter import METRICS_NAME, read_records
from vlm.training.start import build_start
from vlm.vocabulary_transfer import grow_bundle

OLD = 320
WORDS = {"狮子": 0.5, "老虎": 0.25, "森林": 0.25}
WEIGHTS = "open_clip_model.safetensors"
EMBEDDING = "text.token_embedding.weight"
NEW_ROWS_FIRST = (StageConfig(steps=4, trained="new_rows"), StageConfig())


@pytest.fixture
def grown(tmp_path):
    """A tiny bundle grown by seven new pieces, which the captions of the data have."""
    bundle = load_bundle(tiny_bundle(tmp_path / "small"))
    tokenizer = extend(bundle.tokenizer, WORDS, vocab_size=OLD + 7, coverage=1.0).tokenizer
    grow_bundle(bundle, tokenizer, GrowthConfig(init="mean", positions=20), tmp_path / "grown")
    return tmp_path / "grown"


@pytest.fixture
def data(tmp_path):
    samples = [
        replace(sample, captions={"zh": ["森林里的狮子和老虎"], "en": sample.captions["en"]})
        for sample in make_samples(12)
    ]
    return write_split(tmp_path / "data", samples)


def config(grown, data, run_folder, **changes):
    settings = {
        "start_from": grown,
        "run_folder": run_folder,
        "data": DataConfig(folder=data, batch_size=4, workers=0),
        "captions": CaptionConfig(languages=("zh",)),
        "optimizer": OptimizerConfig(learning_rate=1e-2, weight_decay=0.5),
        "schedule": ScheduleConfig(steps=6, warmup_steps=1),
        "checkpoint": CheckpointConfig(every_steps=0),
    }
    return TrainConfig(**(settings | changes))


def changed_tensors(before, after):
    first, second = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    return {name for name in first if not first[name].equal(second[name])}


def test_a_run_goes_on_with_the_bundles_model_tokenizer_and_transform(grown, data, tmp_path):
    bundle = load_bundle(grown)
    start = build_start(config(grown, data, tmp_path / "run"))
    assert start.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    assert start.first_new_id == OLD
    assert start.preprocess_cfg == bundle.preprocess_cfg
    for name, tensor in start.model.state_dict().items():
        assert tensor.equal(bundle.model.state_dict()[name])


def test_the_bundle_of_such_a_run_knows_all_its_languages_and_no_new_rows(grown, data, tmp_path):
    after = load_bundle(build_run(config(grown, data, tmp_path / "run")).fit())
    assert after.languages == ("zh", "en")
    assert after.first_new_id is None
    assert after.tokenizer.fingerprint == load_bundle(grown).tokenizer.fingerprint
    assert len(changed_tensors(grown, tmp_path / "run/bundle")) > 5


def test_in_its_first_steps_only_the_new_rows_change(grown, data, tmp_path):
    settings = {"stages": NEW_ROWS_FIRST, "checkpoint": CheckpointConfig(every_steps=4, keep=9)}
    build_run(config(grown, data, tmp_path / "run", **settings)).fit()
    before = load_file(grown / WEIGHTS)
    stored = load_file(tmp_path / "run/checkpoints/step-00000004/model.safetensors")
    frozen = {name.removeprefix("encoder."): tensor for name, tensor in stored.items()}
    parameters = dict(load_bundle(grown).model.named_parameters())
    for name in parameters.keys() - {EMBEDDING, "log_logit_scale"}:
        assert frozen[name].equal(before[name]), name
    assert frozen["log_logit_scale"].equal(before["logit_scale"])
    assert frozen[EMBEDDING][:OLD].equal(before[EMBEDDING][:OLD])
    assert not frozen[EMBEDDING][OLD:].equal(before[EMBEDDING][OLD:])
    after = load_file(tmp_path / "run/bundle" / WEIGHTS)
    assert not after[EMBEDDING][:OLD].equal(before[EMBEDDING][:OLD])
    assert not after["text.text_projection"].equal(before["text.text_projection"])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 4, 5], ids=lambda step: f"after step {step}")
def test_resuming_in_or_after_the_first_steps_gives_the_same_weights(grown, data, tmp_path, stop):
    settings = {"stages": NEW_ROWS_FIRST, "checkpoint": CheckpointConfig(every_steps=1, keep=9)}
    whole = build_run(config(grown, data, tmp_path / "whole", **settings)).fit()
    cut = config(grown, data, tmp_path / "cut", **settings)
    build_run(cut).fit()
    for folder in sorted((tmp_path / "cut/checkpoints").iterdir())[stop:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    resumed = build_run(cut, resume="auto").fit()
    assert changed_tensors(whole, resumed) == set()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": ModelConfig(embed_dim=64)}, "model"),
        ({"preprocess": PreprocessConfig(mean=(0.5, 0.5, 0.5))}, "preprocess"),
    ],
    ids=["model", "preprocess"],
)
def test_a_model_described_beside_the_bundle_is_refused(grown, data, tmp_path, changes, named):
    with pytest.raises(ConfigError, match=rf"expected no settings of {named}"):
        build_start(config(grown, data, tmp_path / "run", **changes))


def test_a_tokenizer_beside_the_bundle_is_refused(grown, data, tmp_path):
    with pytest.raises(ConfigError, match="expected no settings of tokenizer"):
        build_start(config(grown, data, tmp_path / "run", tokenizer=tmp_path / "other"))


def test_a_stage_of_new_rows_without_new_rows_is_refused(data, tmp_path):
    small = tiny_bundle(tmp_path / "small")
    with pytest.raises(ConfigError, match="a stage trains new_rows, but the model has none"):
        build_start(config(small, data, tmp_path / "run", stages=NEW_ROWS_FIRST))


def scored(run_folder):
    records = read_records(run_folder / METRICS_NAME)
    return {name.split("/")[1] for name in records[-1] if name.startswith("val/")}


@pytest.mark.parametrize(
    ("asked", "expected"), [((), {"zh", "en"}), (("en",), {"en"})], ids=["by default", "asked"]
)
def test_a_run_in_one_language_is_scored_in_that_of_its_start_too(
    grown, data, tmp_path, asked, expected
):
    write_split(data, make_samples(12), split="val")
    plan = EvaluationConfig(every_steps=6, languages=asked)
    build_run(config(grown, data, tmp_path / "run", evaluation=plan)).fit()
    assert scored(tmp_path / "run") >= expected
    assert not scored(tmp_path / "run") & ({"zh", "en"} - expected)


def test_a_language_to_score_in_that_no_caption_has_is_refused(grown, data, tmp_path):
    write_split(data, make_samples(12), split="val")
    plan = EvaluationConfig(every_steps=6, languages=("en", "de"))
    with pytest.raises(ConfigError, match=r"evaluation.languages has de, but val of .* in en;"):
        build_run(config(grown, data, tmp_path / "run", evaluation=plan))
