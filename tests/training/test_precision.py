"""Towers in bfloat16 and float16: the same gradients in parts, and the search for a scale."""

from dataclasses import replace

import pytest
import torch

from tests.builders import IMAGE_SIZE, make_samples, tiny_tokenizer, write_split
from tests.models.test_pretraining import TINY_MULTIWAY
from vlm.batches.batch import Batch
from vlm.batches.config import DataConfig
from vlm.losses.bilingual import BilingualLoss
from vlm.models.build import build_from_config
from vlm.models.pretraining import PretrainingModel
from vlm.training import precision as precisions
from vlm.training.build import build_run
from vlm.training.config import CheckpointConfig, ScheduleConfig, TrainConfig
from vlm.training.monitoring.reporter import METRICS_NAME, read_records
from vlm.training.precision import Precision
from vlm.training.saving.checkpoint import open_checkpoint
from vlm.training.step import ContrastiveStep

CPU = torch.device("cpu")
SAMPLES = 8


def batch():
    ids = torch.arange(SAMPLES)
    texts = tiny_tokenizer().encode([f"red apple {number}" for number in range(SAMPLES)])
    return Batch(
        images=torch.randn(
            SAMPLES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1)
        ),
        texts={"en": texts},
        text_rows={"en": ids},
        image_ids=ids,
        caption_ids={"en": ids},
        uids=tuple(map(str, range(SAMPLES))),
    )


def gradients(name, *, micro_batches=1, mode="exact"):
    """Return the gradients of a step as one vector, as they come and after they are unscaled."""
    torch.manual_seed(0)
    model = PretrainingModel(build_from_config(TINY_MULTIWAY, tiny_tokenizer()))
    precision = Precision(name, CPU)
    step = ContrastiveStep(
        model, BilingualLoss(), mode=mode,
        backward=precision.backward, autocast=precision.autocast,
    )  # fmt: skip
    step(batch().split(micro_batches))

    def vector():
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        assert all(gradient.dtype == torch.float32 for gradient in found)
        return torch.cat(found)

    scaled = vector()
    precision.unscale(list(model.parameters()))
    return scaled, vector()


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("name", "close"), [("bf16", 0.05), ("fp16", 0.005)])
def test_gradients_are_nearly_those_of_float32_in_any_number_of_micro_batches(name, close):
    _, exact = gradients("fp32")
    scaled, whole = gradients(name)
    assert 0 < distance(whole, exact) < close
    torch.testing.assert_close(scaled, whole * (2.0**16 if name == "fp16" else 1))
    _, parts = gradients(name, micro_batches=4)
    assert distance(parts, whole) < close / 5


def test_one_pass_scales_every_pass_alike():
    _, whole = gradients("fp32", micro_batches=4, mode="one_pass")
    _, found = gradients("fp16", micro_batches=4, mode="one_pass")
    assert distance(found, whole) < 0.003


def test_small_gradients_survive_in_float16_by_the_scale(monkeypatch):
    monkeypatch.setattr(precisions, "_FIRST_SCALE", 1.0)
    _, exact = gradients("fp32")
    lost = distance(gradients("fp16")[1], exact)
    monkeypatch.undo()
    assert distance(gradients("fp16")[1], exact) < lost


def test_the_scale_is_halved_by_each_skipped_step_and_doubled_after_many_good_ones(monkeypatch):
    monkeypatch.setattr(precisions, "_GROWTH_STEPS", 3)
    precision = Precision("fp16", CPU)
    scales = []
    for skipped in (True, False, False, True, False, False, False, False, False, False):
        precision.update(torch.tensor(skipped))
        scales.append(precision.scale.item() / 2**16)
    assert scales == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1.0]
    for _ in range(40):
        precision.update(torch.tensor(True))
    assert precision.scale == 1


def test_the_scale_goes_on_where_it_was():
    precision, resumed = Precision("fp16", CPU), Precision("fp16", CPU)
    for skipped in (True, False):
        precision.update(torch.tensor(skipped))
    resumed.load_state_dict(precision.state_dict())
    assert resumed.state_dict() == precision.state_dict()
    assert resumed.scale == 2.0**15


def test_a_run_in_float16_searches_its_scale_and_resumes_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(precisions, "_FIRST_SCALE", 2.0**40)  # far too large
    write_split(tmp_path / "data", make_samples(12))
    tiny_tokenizer().save(tmp_path / "tokenizer")
    config = TrainConfig(
        run_folder=tmp_path / "run",
        precision="fp16",
        tokenizer=tmp_path / "tokenizer",
        model=TINY_MULTIWAY,
        data=DataConfig(folder=tmp_path / "data", batch_size=4, workers=0),
        schedule=ScheduleConfig(steps=40, warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=30, keep=2),
        report_every=1,
    )
    bundle = build_run(config).fit()
    records = read_records(tmp_path / "run" / METRICS_NAME)
    scales = [record["loss_scale"] for record in records]
    assert scales[0] == 2.0**39  # after the first step, whose gradients were infinite
    assert 2.0**10 < scales[-1] < 2.0**35
    assert records[-1]["skipped_steps"] == 0  # a search is no alarm
    assert records[-1]["loss"] < records[0]["loss"]
    weights = (bundle / "open_clip_model.safetensors").read_bytes()
    saved = tmp_path / "run" / "checkpoints" / "step-00000030"
    assert "scaler.safetensors" in open_checkpoint(saved).files
    again = replace(config, run_folder=tmp_path / "again")
    (tmp_path / "again").mkdir()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "again" / "checkpoints")
    resumed = build_run(again, resume=tmp_path / "again" / "checkpoints" / "step-00000030").fit()
    assert (resumed / "open_clip_model.safetensors").read_bytes() == weights
