"""Runs whose weights are sharded over ranks: scored, saved, resumed by others, left whole."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.builders import TINY_MODEL, make_samples, tiny_bundle, tiny_tokenizer, write_split
from tests.models.test_pretraining import TINY_MULTIWAY
from tests.support.commands import run_vlm
from vlm.batches.config import DataConfig
from vlm.losses.plan import DistillationConfig
from vlm.training.config import (
    AdaptationConfig,
    AveragingConfig,
    CheckpointConfig,
    EvaluationConfig,
    ObjectivesConfig,
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
    config_as_yaml,
)
from vlm.training.monitoring.reporter import METRICS_NAME, read_records

STEPS, SAVED = 6, 3
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO_2 = SHARDED | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
HYBRID = SHARDED | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_split(folder / "data", make_samples(24))
    write_split(folder / "data", make_samples(12), split="val")
    tiny_tokenizer().save(folder / "tokenizer")
    tiny_bundle(folder / "teacher", seed=1)
    return folder


def train(inputs, folder, *, processes=1, sharding=None, launcher=(), resume=False, **changes):
    """Run the command; return what it printed for people."""
    config = TrainConfig(
        run_folder=folder,
        tokenizer=inputs / "tokenizer",
        model=TINY_MULTIWAY,
        data=DataConfig(folder=inputs / "data", batch_size=12, workers=0),
        # Adam would make whole steps of gradients that are rounding errors alone.
        optimizer=OptimizerConfig(eps=1e-4),
        schedule=ScheduleConfig(steps=STEPS, warmup_steps=2),
        averaging=AveragingConfig(ema_decay=0.9),
        evaluation=EvaluationConfig(every_steps=SAVED),
        checkpoint=CheckpointConfig(every_steps=SAVED, keep=2),
        report_every=1,
    )
    path = folder.with_suffix(".yaml")
    path.write_text(config_as_yaml(replace(config, **changes)))
    more = ["--resume"] if resume else []
    words = ("train", "--config", path, *more)
    return run_vlm(*words, launcher=launcher, processes=processes, environment=sharding)[1]


@pytest.fixture(scope="module")
def whole(inputs):
    """A run under DDP."""
    folder = inputs / "whole"
    train(inputs, folder, processes=4)
    return folder


def records(folder):
    found = {}
    for record in read_records(folder / METRICS_NAME):
        found.setdefault(record["step"], {}).update(record)
    return found


def assert_alike(folder, expected):
    """The losses and scores of two runs, and the weights and averages that they leave."""
    found, wanted = records(folder), records(expected)
    assert found.keys() == wanted.keys() == set(range(1, STEPS + 1))
    keys = {"loss", "gradient_norm", "val/zh/mean_recall", "val_ema/en/text_to_image/mrr"}
    assert keys <= wanted[STEPS].keys()
    for step, record in wanted.items():
        for key in keys & record.keys():
            assert found[step][key] == pytest.approx(record[key], rel=1e-5, abs=1e-5), (step, key)
    for bundle in ("bundle", "bundle-ema"):
        name = f"{bundle}/open_clip_model.safetensors"
        weights, wanted_weights = load_file(folder / name), load_file(expected / name)
        assert weights.keys() == wanted_weights.keys()
        for key, value in wanted_weights.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)


def cut_off(folder, to):
    """Copy a run as it was when it was killed after its first checkpoint."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "checkpoints" / f"step-{STEPS:08d}")
    for bundle in ("bundle", "bundle-ema"):
        shutil.rmtree(to / bundle)
    return to


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_runs_are_those_of_ddp_and_each_goes_on_from_the_others_checkpoints(
    inputs, whole, tmp_path
):
    sharded = tmp_path / "sharded"
    said = train(inputs, sharded, processes=4, sharding=SHARDED)
    assert "ranks: 4 on cpu, fp32, weights sharded over 4 ranks" in said
    assert_alike(sharded, whole)
    for name, start, processes, sharding in (
        ("on two", sharded, 2, SHARDED),
        ("on one, whole", sharded, 1, None),
        ("hybrid, from whole weights", whole, 4, HYBRID),
    ):
        folder = cut_off(start, tmp_path / name)
        train(inputs, folder, processes=processes, sharding=sharding, resume=True)
        assert_alike(folder, whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_what_zero_2_divides_is_divided_by_the_file_for_it(inputs, whole, tmp_path):
    divided, resumed = tmp_path / "divided", tmp_path / "resumed"
    launcher = (
        "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2-zero2.yaml",
        "--num_processes", "2",
    )  # fmt: skip
    said = train(inputs, divided, launcher=launcher)
    assert "ranks: 2 on cpu, fp32, weights sharded over 2 ranks, kept for the backward pass" in said
    assert_alike(divided, whole)
    cut_off(divided, resumed)
    train(inputs, resumed, processes=4, sharding=ZERO_2, resume=True)
    assert_alike(resumed, whole)


def to_a_teacher(inputs):
    """Losses of all kinds towards a model of two towers that reads English."""
    weights = {"feature_weight": 1.0, "structure_weight": 1.0, "logit_weight": 1.0}
    plan = DistillationConfig(teacher=inputs / "teacher", languages=("en",), **weights)
    return {"model": TINY_MODEL, "objectives": ObjectivesConfig(distillation=plan)}


ADAPTERS = {"adapt": AdaptationConfig(lora_rank=2)}
WAYS = {
    "stages": lambda inputs: {
        "stages": (
            StageConfig(steps=2, trained="text", warmup_steps=1),
            StageConfig(steps=2, trained="image", warmup_steps=1),
            StageConfig(warmup_steps=1),
        )
    },
    "adapters": lambda inputs: ADAPTERS,
    "adapters of two towers": lambda inputs: ADAPTERS | {"model": TINY_MODEL},
    "a teacher": to_a_teacher,
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_run_trains_in_every_way_as_under_ddp_and_goes_on(inputs, tmp_path, way):
    changes, whole, sharded = WAYS[way](inputs), tmp_path / "whole", tmp_path / "sharded"
    for folder, sharding in ((whole, None), (sharded, SHARDED)):
        train(inputs, folder, processes=2, sharding=sharding, **changes)
    assert_alike(sharded, whole)
    resumed = cut_off(sharded, tmp_path / "resumed")
    train(inputs, resumed, processes=2, sharding=SHARDED, resume=True, **changes)
    assert_alike(resumed, whole)
