"""The moving average of the weights: its formula, its place in a run, and going on with it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.tiny_run import config, losses
from vlm.bundle import load_bundle
from vlm.errors import ConfigError
from vlm.training.build import build_run
from vlm.training.config import AveragingConfig, CheckpointConfig, EvaluationConfig, TrainConfig
from vlm.training.optimization.averaging import MovingAverage, mean_of_checkpoints
from vlm.training.progress import Progress
from vlm.training.saving.checkpoint import Checkpoints

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def walk(model, steps, average):
    """Move the weights at random, and the average after them; return the weights of each step."""
    seen = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3, 4, 4))
        average.update(step)
        seen.append({name: each.double().clone() for name, each in model.state_dict().items()})
    return seen


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_that_of_the_formula_statistics_of_batch_norm_included(model, decay):
    expected = {name: each.double().clone() for name, each in model.state_dict().items()}
    average = MovingAverage(model, decay)
    for step, weights in enumerate(walk(model, 20, average), start=1):
        kept = min(decay, (1 + step) / (10 + step))
        expected = {name: kept * expected[name] + (1 - kept) * weights[name] for name in weights}
    del expected["1.num_batches_tracked"]
    found = average.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


def test_averages_take_the_place_of_the_weights_for_a_while_bit_for_bit(model):
    average = MovingAverage(model, 0.9)
    walk(model, 3, average)
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    averages = {name: each.clone() for name, each in average.state_dict().items()}
    with average.in_place():
        for name, each in averages.items():
            assert torch.equal(model.state_dict()[name], each), name
    for name, each in model.state_dict().items():
        assert torch.equal(each, weights[name]), name
    for name, each in average.state_dict().items():
        assert torch.equal(each, averages[name]), name


@pytest.mark.slow
def test_a_run_scores_and_leaves_the_average_next_to_the_weights(inputs, tmp_path):
    settings = config(inputs, tmp_path / "ema", averaging=AveragingConfig(ema_decay=0.9))
    run = build_run(settings)
    bundle = run.fit()
    key = "en/mean_recall"
    assert list(losses(tmp_path / "ema", f"val/{key}")) == [3, 6, 7]
    assert list(losses(tmp_path / "ema", f"val_ema/{key}")) == [3, 6, 7]
    averages = load_bundle(tmp_path / "ema" / "bundle-ema").model.state_dict()
    for name, each in run.average.state_dict().items():
        assert torch.equal(averages[name.removeprefix("encoder.")], each), name
    # The average changes nothing of what is trained.
    plain = build_run(config(inputs, tmp_path / "plain")).fit()
    assert (bundle / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert not (tmp_path / "plain" / "bundle-ema").exists()


@pytest.mark.slow
def test_going_on_from_a_checkpoint_leaves_the_same_average(inputs, tmp_path):
    settings = config(
        inputs, tmp_path, averaging=AveragingConfig(ema_decay=0.9), evaluation=EvaluationConfig()
    )
    build_run(settings).fit()
    whole = (tmp_path / "bundle-ema" / WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000007")
    shutil.rmtree(tmp_path / "bundle-ema")
    run = build_run(settings, resume="auto")
    assert run.progress.step == 5
    run.fit()
    assert (tmp_path / "bundle-ema" / WEIGHTS).read_bytes() == whole


@pytest.mark.slow
def test_the_mean_of_the_last_checkpoints_is_scored_and_left_next_to_the_weights(
    inputs,
    tmp_path,
):
    settings = config(
        inputs,
        tmp_path,
        averaging=AveragingConfig(last_checkpoints=3),
        checkpoint=CheckpointConfig(every_steps=2, keep=3),
    )
    build_run(settings).fit()
    kept = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name[-1] for folder in kept] == ["4", "6", "7"]
    weights = [load_file(folder / "model.safetensors") for folder in kept]
    found = load_bundle(tmp_path / "bundle-mean").model.state_dict()
    for name, each in found.items():
        if each.is_floating_point():
            mean = sum(of[f"encoder.{name}"].double() for of in weights) / 3
            torch.testing.assert_close(each.double(), mean, rtol=1e-6, atol=1e-7)
    assert list(losses(tmp_path, "val_mean/en/mean_recall")) == [3, 6, 7]


def test_a_damaged_checkpoint_is_left_out_of_the_mean(tmp_path, model, capsys):
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3, 4):
        with torch.no_grad():
            model[3].bias.fill_(step)
        checkpoints.save(step, {"model": model, "progress": Progress(step, step)})
    with (tmp_path / "step-00000002" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    newest = checkpoints.newest(2, until=3)
    assert [each.step for each in newest] == [1, 3]
    assert "step-00000002/model.safetensors is damaged" in capsys.readouterr().err
    with mean_of_checkpoints(model, newest).in_place():
        assert model[3].bias.tolist() == [2.0, 2.0]
    assert model[3].bias.tolist() == [4.0, 4.0]


def test_a_mean_of_more_checkpoints_than_are_kept_is_refused():
    averaging = AveragingConfig(last_checkpoints=3)
    with pytest.raises(ConfigError, match="last_checkpoints is 3, and 2 are kept; expected"):
        TrainConfig(averaging=averaging)
    with pytest.raises(ConfigError, match="last_checkpoints is 3, and 0 are kept; expected"):
        TrainConfig(averaging=averaging, checkpoint=CheckpointConfig(every_steps=0, keep=9))


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ConfigError, match=f"ema_decay is {decay}; expected null, or 0 to less"):
        AveragingConfig(ema_decay=decay)
