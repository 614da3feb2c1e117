"""The plan of a run: against real runs, against known models, and for runs that would fail."""

import gc
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.meters import TensorMeter
from tests.builders import (
    TINY_MODEL,
    make_sample,
    make_samples,
    tiny_bundle,
    tiny_tokenizer,
    write_split,
)
from tests.support.commands import run_vlm
from tests.support.processes import as_launched, run_in_processes
from vlm.batches.collate import collate
from vlm.batches.config import CaptionConfig, DataConfig, MixedSourceConfig
from vlm.bundle import load_bundle
from vlm.losses.plan import DistillationConfig, LossConfig, LossPlan
from vlm.models.config import ImageTowerConfig, MaskedConfig, ModelConfig
from vlm.models.masked import Hidden
from vlm.models.multiway_config import MultiwayConfig
from vlm.text.tokenizer import load_tokenizer
from vlm.training.build import build_run
from vlm.training.config import (
    AdaptationConfig,
    CheckpointConfig,
    ClusterConfig,
    EvaluationConfig,
    ObjectivesConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)
from vlm.training.planning.dry_run import dry_run
from vlm.training.planning.hollow import HollowTensors

CONTEXT, BATCH, RANKS = 6, 64, 4
TWO_TOWERS = replace(
    TINY_MODEL, vision_cfg=ImageTowerConfig(timm_model_name="test_vit", image_size=32)
)
MULTIWAY = ModelConfig(
    multiway=MultiwayConfig(
        image_size=32, patch_size=8, width=64, heads=2, ffn_width=128, layers=2, vl_layers=1,
        embed_dim=32, text_positions=66,
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A data folder and a tokenizer whose context every other caption fills."""
    folder = tmp_path_factory.mktemp("inputs")
    write_split(folder / "data", make_samples(80), samples_per_shard=40)
    tiny_tokenizer(context_length=CONTEXT).save(folder / "tokenizer")
    return folder


def config(inputs, **changes):
    settings = {
        "run_folder": inputs / "run",
        "tokenizer": inputs / "tokenizer",
        "model": TWO_TOWERS,
        "data": DataConfig(folder=inputs / "data", batch_size=BATCH, workers=0),
        "captions": CaptionConfig(main_ratio=0.0),
        "schedule": ScheduleConfig(steps=9, warmup_steps=2),
    }
    return TrainConfig(**(settings | changes))


def peak_of_a_run(rank, settings, environment):
    """The most bytes of tensors that are alive in the second step of a run, counted one by one."""
    as_launched(rank, RANKS)
    os.environ.update(environment)
    with TensorMeter() as meter:
        run = build_run(settings)
        batches = run.loader.read(run.data, 2)
        run.train_step(next(batches), 0)
        batch = next(batches)
        gc.collect()
        meter.peak = meter.live
        run.train_step(batch, 1)
    return torch.tensor(meter.peak - batch.images.nbytes)  # these are on the host, and a copy too


SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("sharding", "environment"), [("none", {}), ("full", SHARDED)], ids=["ddp", "fsdp2"]
)
@pytest.mark.parametrize(
    ("model", "parts", "trained"),
    [(TWO_TOWERS, 1, "all"), (TWO_TOWERS, 1, "text"), (MULTIWAY, 2, "all")],
    ids=["two towers", "a locked tower", "multiway in parts"],
)
def test_memory_is_that_of_a_run_of_four_processes(
    inputs, model, parts, trained, sharding, environment
):
    loss, stages = LossConfig(micro_batches=parts), (StageConfig(trained=trained),)
    settings = config(inputs, model=model, loss=loss, stages=stages)
    plan = dry_run(settings, ClusterConfig(world=RANKS, sharding=sharding))
    assert plan.problems == []
    for found in run_in_processes(peak_of_a_run, RANKS, settings, environment):
        assert plan.numbers["memory"]["peak"] == pytest.approx(found.item(), rel=0.05)


MASKED = ObjectivesConfig(masked=MaskedConfig(cmlm_weight=1.0, cmim_weight=1.0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"model": MULTIWAY, "objectives": MASKED}, {"model": TINY_MODEL}],
    ids=["two towers", "masked multiway", "convolutions"],
)
def test_flops_are_those_that_torch_counts_of_a_real_step(inputs, changes):
    settings = config(inputs, **changes)
    run = build_run(settings)
    examples = run.loader.order.sources[0].read(0, 0, 0, 32)
    batch = collate(
        [run.loader.examples[key] for key in examples],
        tokenizer=run.start.tokenizer,
        masks=run.loader.masks,
    )
    hidden = Hidden(batch.text_rows, batch.hidden_words, batch.hidden_patches)
    with FlopCounterMode(display=False) as counter:
        encoded = run.model(batch.images, batch.texts, hidden)
        heads = encoded.heads.values()
        features = [head.image.sum() + sum(map(torch.sum, head.text.values())) for head in heads]
        sum(features, sum(encoded.others.values())).backward()
    plan = dry_run(settings, ClusterConfig(world=1))
    assert plan.problems == []
    # What torch does not count of a CPU, attention, and the loss are small at this size.
    of_sample = counter.get_total_flops() / 32
    assert of_sample < plan.numbers["compute"]["FLOP of a sample"] < 1.05 * of_sample + 2e5


def test_attention_is_counted():
    mode = HollowTensors()
    with mode:
        query = torch.empty(2, 3, 5, 8, requires_grad=True)
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    product = 2 * (2 * 3) * 5 * 8 * 5  # of queries with keys, and as much of weights with values
    assert mode.flops == 2 * product + 5 * product  # backward the weights are computed again


def test_recomputation_saves_activations_and_is_no_work_of_the_model(inputs):
    changes = {"model": MULTIWAY, "precision": "bf16"}
    plain = dry_run(config(inputs, **changes), ClusterConfig(world=2)).numbers
    adapt = AdaptationConfig(grad_checkpointing="blocks")
    again = dry_run(config(inputs, **changes, adapt=adapt), ClusterConfig(world=2)).numbers
    assert again["memory"]["activations"] < 0.6 * plain["memory"]["activations"]
    assert again["memory"]["peak"] < plain["memory"]["peak"]
    kept = again["memory"]["activations without recomputation"]
    assert kept == pytest.approx(plain["memory"]["activations"], rel=1e-3)
    assert again["compute"] == plain["compute"]


def test_divided_weights_take_a_part_of_each_device(inputs):
    plans = {
        sharding: dry_run(
            config(inputs, model=MULTIWAY),
            ClusterConfig(world=8, ranks_per_node=4, sharding=sharding),
        ).numbers
        for sharding in ("none", "hybrid", "full")
    }
    weights = [plan["memory"]["weights"] for plan in plans.values()]
    assert weights[1] == pytest.approx(weights[0] / 4, rel=0.02)
    assert weights[2] == pytest.approx(weights[0] / 8, rel=0.02)
    assert len({str(plan["parameters"]) for plan in plans.values()}) == 1
    assert len({plan["compute"]["FLOP of a sample"] for plan in plans.values()}) == 1
    assert plans["full"]["network"]["weights"] > plans["hybrid"]["network"]["weights"] > 0


def test_stages_are_planned_at_their_own_sizes(inputs):
    sizes = [(BATCH // 2, 32), (BATCH // 4, 64), (BATCH, 16)]
    alone = [
        dry_run(
            config(
                inputs,
                data=replace(config(inputs).data, batch_size=samples),
                stages=(StageConfig(image_size=side),),
            ),
            ClusterConfig(world=RANKS),
        ).numbers
        for samples, side in sizes
    ]
    stages = tuple(StageConfig(steps=3, batch_size=each, image_size=side) for each, side in sizes)
    plan = dry_run(config(inputs, stages=stages), ClusterConfig(world=RANKS))
    assert plan.problems == []
    peaks = [each["memory"]["peak"] for each in alone]
    flops = [each["compute"]["FLOP of a step and device"] for each in alone]
    assert plan.numbers["memory"]["peak"] == max(peaks)
    assert plan.numbers["compute"]["FLOP of a step and device"] == max(flops)
    assert plan.numbers["largest"] == {
        "stage of the memory": 1 + peaks.index(max(peaks)),
        "stage of the rest": 1 + flops.index(max(flops)),
    }
    assert len(set(peaks)) == len(set(flops)) == 3


def test_a_stage_is_planned_for_what_it_trains(inputs):
    whole, locked, staged = (
        dry_run(config(inputs, **changes), ClusterConfig(world=RANKS)).numbers
        for changes in (
            {},
            {"adapt": AdaptationConfig(image_unlocked_groups=0)},
            {"stages": (StageConfig(trained="text"),)},
        )
    )
    for part in ("memory", "compute", "network", "disk"):
        of_both = [{**each[part], "free": None} for each in (locked, staged)]
        assert of_both[0] == of_both[1] != {**whole[part], "free": None}
    most = (StageConfig(steps=3, trained="text"), StageConfig())
    plan = dry_run(config(inputs, stages=most), ClusterConfig(world=RANKS)).numbers
    for part in ("memory", "compute", "network"):
        assert plan[part] == whole[part]
    assert plan["disk"]["checkpoint"] == whole["disk"]["checkpoint"]


def test_the_model_and_the_disk_are_counted(inputs):
    run = build_run(config(inputs))
    numbers = dry_run(config(inputs), ClusterConfig(world=1)).numbers
    assert numbers["parameters"]["all"] == sum(p.numel() for p in run.model.parameters())
    assert numbers["parameters"]["image tower"] == sum(
        p.numel() for p in run.start.model.visual.parameters()
    )
    run.checkpoints.save(0, run.state)
    list(run.loader.read(run.data, 1))
    run.train_step(next(run.loader.read(run.data, 1)), 0)
    run.checkpoints.save(1, run.state)
    files = (run.config.run_folder / "checkpoints" / "step-00000001").iterdir()
    size = sum(file.stat().st_size for file in files)
    assert numbers["disk"]["checkpoint"] == pytest.approx(size, rel=0.05)
    shutil.rmtree(run.config.run_folder)


def test_a_teacher_is_held_and_reads_the_batch(inputs, tmp_path):
    tokenizer = load_tokenizer(inputs / "tokenizer")
    bundle = tiny_bundle(tmp_path / "bundle", context_length=CONTEXT)
    assert load_bundle(bundle).tokenizer.fingerprint == tokenizer.fingerprint
    settings = {"start_from": bundle, "tokenizer": TrainConfig().tokenizer, "model": ModelConfig()}
    alone = dry_run(config(inputs, **settings), ClusterConfig(world=1))
    taught = ObjectivesConfig(distillation=DistillationConfig(feature_weight=1.0))
    plan = dry_run(config(inputs, **settings, objectives=taught), ClusterConfig(world=1))
    assert alone.problems == plan.problems == []
    weights = plan.numbers["memory"]["teachers"]
    assert weights == pytest.approx(plan.numbers["memory"]["weights"], rel=0.01)
    added = plan.numbers["memory"]["peak"] - alone.numbers["memory"]["peak"]
    assert added == weights
    # A forward pass is a third of a step, but for the first layer, which has no input's gradient.
    of_step, of_both = (each.numbers["compute"]["FLOP of a sample"] for each in (alone, plan))
    assert of_both == pytest.approx(of_step * 4 / 3, rel=0.05)


def test_everything_that_would_stop_a_run_is_found_at_once(inputs, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "config.yaml").touch()
    settings = config(
        inputs,
        run_folder=tmp_path,
        data=DataConfig(folder=inputs / "data", batch_size=99, workers=0),
        loss=LossConfig(plan=LossPlan(group_size=3, kind="sigmoid")),
        evaluation=EvaluationConfig(every_steps=3, folder=inputs / "missing"),
    )
    problems = dry_run(settings, ClusterConfig(world=4)).problems
    for said in (
        "holds a run already",
        "group_size is 3; expected a divisor of the world size, 4",
        "the batch has 99 samples; expected a multiple of 4, the number of processes",
        "loss.plan.kind is sigmoid and the model has no bias",
        "missing is missing",
    ):
        assert any(said in problem for problem in problems), said
    assert len(problems) == 5
    kept = CheckpointConfig(every_steps=2)
    settings = config(inputs, run_folder=tmp_path / "new", checkpoint=kept)
    (problem,) = dry_run(settings, ClusterConfig(world=4)).problems
    assert "GiB for 3 checkpoints and a bundle" in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": "nowhere"}, "nowhere holds no tokenizer"),
        ({"data": DataConfig(folder="nowhere")}, "nowhere is missing"),
        ({"data": DataConfig(batch_size=400)}, "a batch takes 400 samples of the source 'data'"),
        ({"captions": CaptionConfig(languages=("fr",))}, "captions.languages has fr"),
        ({"model": replace(MULTIWAY, multiway=replace(MULTIWAY.multiway, text_positions=5))},
         "multiway has positions for 3 tokens"),
    ],
)  # fmt: skip
def test_a_plan_names_what_does_not_fit(inputs, changes, said):
    settings = config(inputs, **changes)
    if settings.data.batch_size == 400:
        settings = replace(settings, data=replace(settings.data, folder=inputs / "data"))
    assert any(said in problem for problem in dry_run(settings, ClusterConfig()).problems)


def test_sources_that_do_not_serve_all_nodes_or_languages_are_warned_of(inputs, tmp_path):
    samples = [make_sample(n, captions={"en": ["a thing"]}) for n in range(80)]
    write_split(tmp_path / "english", samples, samples_per_shard=80)
    paths = (inputs / "data", tmp_path / "english")
    sources = tuple(MixedSourceConfig(path=str(path)) for path in paths)
    settings = config(inputs, data=DataConfig(sources=sources, batch_size=BATCH, workers=0))
    plan = dry_run(settings, ClusterConfig(world=32, ranks_per_node=8))
    assert plan.problems == []
    first, second, third = plan.warnings
    assert "'data' has 2 shards for 4 streams" in first
    assert "'english' has 1 shards for 4 streams" in second
    assert third == "of 32 samples of the source 'english' none has a caption in zh"
    meant = (sources[0], replace(sources[1], languages=("en",)))
    settings = replace(settings, data=replace(settings.data, sources=meant))
    assert dry_run(settings, ClusterConfig(world=8)).warnings == []


def test_the_command_prints_the_plan_and_leaves_nothing(inputs, tmp_path):
    words = [
        "train", "--dry-run", "--world", "2", "--run_folder", tmp_path / "run",
        "--data.folder", inputs / "data", "--data.batch_size", "8",
        "--tokenizer", inputs / "tokenizer", "--model", "configs/model/emoji-tiny.yaml",
    ]  # fmt: skip
    out, _ = run_vlm(*words)
    assert "seconds of a step" in out
    out, err = run_vlm(*words, "--json", "--loss.plan.group_size", "3", code=2)
    assert json.loads(out)["cluster"]["ranks"] == 2
    assert err.endswith("vlm: the run would not get through: 1 problem\n")
    assert not (tmp_path / "run").exists()
