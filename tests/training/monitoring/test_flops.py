"""The FLOP of a run, compared with what torch counts of a real step."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.builders import TINY_MODEL
from tests.models.test_pretraining import TINY_MULTIWAY
from tests.support.tiny_run import BATCH, config
from vlm.training.build import build_run
from vlm.training.config import AdaptationConfig, EvaluationConfig
from vlm.training.monitoring.flops import FlopMeter, peak_tflops
from vlm.training.monitoring.reporter import METRICS_NAME, read_records


@pytest.mark.parametrize("model", [TINY_MODEL, TINY_MULTIWAY], ids=["two towers", "multiway"])
def test_the_flop_are_those_of_a_real_step_without_its_loss(inputs, tmp_path, model):
    run = build_run(config(inputs, tmp_path, model=model))
    batch = next(run.loader.read(run.data, 1))
    with FlopCounterMode(display=False) as counter:
        run.train_step(batch, 0)
    rates = run.flops.rates(batch, BATCH * 1e12, run.model)
    total = counter.get_total_flops()  # with the similarities of so small a batch
    assert total * (1 - 5e-4) < rates["tflop_per_s"] < total
    assert rates["mfu"] is None


def test_what_is_computed_again_or_at_once_does_not_count(inputs, tmp_path):
    plain = build_run(config(inputs, tmp_path, model=TINY_MULTIWAY))
    batch = next(plain.loader.read(plain.data, 1))
    adapt = AdaptationConfig(grad_checkpointing="blocks")
    again = build_run(config(inputs, tmp_path, model=TINY_MULTIWAY, adapt=adapt))
    assert again.flops.rates(batch, 1.0, again.model) == plain.flops.rates(batch, 1.0, plain.model)
    runs = [build_run(config(inputs, tmp_path, parallel_towers=each)) for each in (False, True)]
    rates = [run.flops.rates(batch, 1.0, run.model) for run in runs]
    assert rates[0] == rates[1]


def test_a_locked_tower_has_no_backward_pass_and_larger_images_cost_more(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path))
    batch = next(run.loader.read(run.data, 1))
    images = torch.nn.functional.interpolate(batch.images, scale_factor=2.0)
    whole, large = (
        run.flops.rates(each, 1.0, run.model)["tflop_per_s"]
        for each in (batch, replace(batch, images=images))
    )
    for parameter in run.start.model.visual.parameters():
        parameter.requires_grad_(False)
    locked = run.flops.rates(batch, 1.0, run.model)["tflop_per_s"]
    assert locked < 0.9 * whole
    assert large > 1.5 * whole


def test_two_devices_share_the_samples(inputs, tmp_path):
    settings = config(inputs, tmp_path)
    run = build_run(settings)
    batch = next(run.loader.read(run.data, 1))
    two = FlopMeter(settings, run.model, torch.device("cpu"), 2).rates(batch, 1e12, run.model)
    one = run.flops.rates(batch, 1e12, run.model)
    assert two["tflop_per_s"] == one["tflop_per_s"] / 2


def test_a_model_that_needs_contents_is_said_once_and_trains(inputs, tmp_path, capsys, monkeypatch):
    def count(*_, **__):
        raise RuntimeError("a number\nis asked for")

    monkeypatch.setattr("vlm.training.monitoring.flops.count_flops", count)
    build_run(config(inputs, tmp_path, evaluation=EvaluationConfig())).fit()
    records = read_records(tmp_path / METRICS_NAME)
    assert {record["tflop_per_s"] for record in records} == {None}
    shown = capsys.readouterr().err
    assert shown.count("warning: its FLOP cannot be counted: a number is asked for\n") == 1


@pytest.mark.parametrize(
    ("device", "half", "peak"),
    [
        ("NVIDIA H200", True, 989.0),
        ("NVIDIA H100 80GB HBM3", True, 989.0),
        ("NVIDIA H100 PCIe", True, 756.0),
        ("NVIDIA A100-SXM4-80GB", True, 312.0),
        ("NVIDIA A100-SXM4-80GB", False, 19.5),
        ("NVIDIA L40S", True, 362.0),
        ("NVIDIA L4", True, 121.0),
        ("Tesla T4", True, 65.0),
        ("NVIDIA A10G", True, None),
        ("NVIDIA H20", True, None),
    ],
)
def test_peaks_are_those_of_the_device_and_of_no_other(device, half, peak):
    assert peak_tflops(device, half=half) == peak
