import pytest
import torch
from accelerate import Accelerator

from tests.builders import IMAGE_SIZE, make_samples, tiny_model, tiny_tokenizer, write_split
from vlm.data.config import CaptionConfig
from vlm.data.dataset import ShardedSplit
from vlm.data.loader import BatchOrder, TrainingExamples, TrainingLoader
from vlm.data.sample import Batch
from vlm.errors import TrainingError
from vlm.images.config import AugmentationConfig, PreprocessConfig
from vlm.images.transforms import TrainingTransform
from vlm.losses.bilingual import BilingualLoss
from vlm.models.pretraining import PretrainingModel
from vlm.text.tokenizer import TokenBatch
from vlm.training.checkpoint import Checkpoints, Progress
from vlm.training.config import OptimizerConfig, ScheduleConfig
from vlm.training.optimizer import build_optimizer
from vlm.training.reporter import METRICS_NAME, Reporter, read_metrics
from vlm.training.step import CachedContrast
from vlm.training.trainer import LoopConfig, Trainer

STEPS, BATCH = 7, 4


def fit(
    folder, *, learning_rate=1e-3, progress=None, evaluated=None, micro_batches=1, mode="exact"
):
    """Train the tiny model on twelve samples; return it."""
    tokenizer = tiny_tokenizer()
    accelerator = Accelerator(cpu=True)
    model = PretrainingModel(tiny_model(tokenizer))
    optimizer = build_optimizer(model, OptimizerConfig())
    model, optimizer = accelerator.prepare(model, optimizer)
    samples = ShardedSplit(write_split(folder / "data", make_samples(12)), "train")
    transform = TrainingTransform(PreprocessConfig(), AugmentationConfig(), IMAGE_SIZE)
    examples = TrainingExamples(samples, transform, CaptionConfig(), seed=0)
    checkpoints = Checkpoints(folder / "checkpoints", keep=9)
    progress = progress or Progress(0, 0)
    with Reporter(folder, samples=STEPS * BATCH, progress=progress, active=True) as reporter:
        trainer = Trainer(
            config=LoopConfig(
                schedule=ScheduleConfig(steps=STEPS, warmup_steps=2),
                learning_rate=learning_rate,
                max_gradient_norm=1.0,
                report_every=2,
                evaluate_every=3,
                checkpoint_every=5,
                micro_batches=micro_batches,
                seed=0,
            ),
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            contrast=CachedContrast(BilingualLoss(), model, mode=mode),
            loader=TrainingLoader(examples, BatchOrder(12, BATCH), tokenizer, workers=0),
            checkpoints=checkpoints,
            reporter=reporter,
            evaluate=evaluated or (lambda encoder: {"val/score": 0.5}),
        )
        trainer.fit(progress)
    return model.encoder


def test_reports_evaluates_and_saves_when_due_and_at_the_end(tmp_path):
    fit(tmp_path)
    records = read_metrics(tmp_path / METRICS_NAME)
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6, 7]
    assert [r["step"] for r in records if "val/score" in r] == [3, 6, 7]
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-00000005", "step-00000007"]
    assert all(r["samples_per_s"] > 0 and r["logit_scale"] <= 100 for r in records if "loss" in r)


def test_the_learning_rate_is_that_of_the_schedule(tmp_path):
    fit(tmp_path, learning_rate=0.25)
    rates = {
        r["step"]: r["learning_rate"] for r in read_metrics(tmp_path / METRICS_NAME) if "loss" in r
    }
    assert rates[2] == 0.25
    assert rates[4] > rates[6] > rates[7] > 0


def test_going_on_takes_the_remaining_steps_only(tmp_path):
    fit(tmp_path, progress=Progress(4, 4 * BATCH))
    steps = [r["step"] for r in read_metrics(tmp_path / METRICS_NAME) if "loss" in r]
    assert steps == [6, 7]


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights(tmp_path):
    weights = []

    def remember(encoder):
        weights.append([parameter.detach().clone() for parameter in encoder.parameters()])
        with torch.no_grad():
            encoder.log_logit_scale.fill_(torch.nan)
        return {}

    with pytest.raises(TrainingError, match=r"gradient at step 3 is nan.*sample-"):
        fit(tmp_path, evaluated=remember)
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_NAME) if "loss" in r] == [2]
    assert len(weights) == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights[0])


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_micro_batches_train_and_report_the_candidates_they_saw(tmp_path, mode):
    fit(tmp_path, micro_batches=2, mode=mode)
    records = [r for r in read_metrics(tmp_path / METRICS_NAME) if "loss" in r]
    assert [r["candidates"] for r in records] == [BATCH] * 4
    assert all(0 <= r["accuracy"] <= 1 for r in records)


def test_a_batch_is_split_into_parts_of_about_one_size():
    samples = torch.arange(7)
    batch = Batch(
        images=torch.zeros(7, 3, 2, 2),
        texts={"en": TokenBatch(samples[:, None], torch.ones(7, 1, dtype=torch.bool))},
        image_ids=samples,
        caption_ids={"en": samples + 10},
        uids=tuple("abcdefg"),
    )
    parts = batch.split(3)
    assert [part.uids for part in parts] == [tuple("abc"), tuple("def"), ("g",)]
    for field in ("images", "image_ids"):
        joined = torch.cat([getattr(part, field) for part in parts])
        assert torch.equal(joined, getattr(batch, field))
    assert torch.equal(torch.cat([part.texts["en"].ids for part in parts]), samples[:, None])
    assert torch.equal(torch.cat([part.caption_ids["en"] for part in parts]), samples + 10)
    assert [len(part.uids) for part in batch.split(1)] == [7]
    assert [len(part.uids) for part in batch.split(9)] == [1] * 7
