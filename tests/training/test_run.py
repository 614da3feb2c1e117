"""The loop on tiny data: what is due when, what stops it, and what it refuses to go on with."""

import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.builders import make_sample, make_samples, write_split
from tests.support.commands import ROOT
from tests.support.tiny_run import BATCH, STEPS, config, losses
from vlm.batches.batch import Batch
from vlm.batches.config import CaptionConfig, DataConfig
from vlm.errors import ConfigError, DataError, TrainingError
from vlm.losses.plan import LossConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.text.tokenizer import TokenBatch
from vlm.training.build import build_run
from vlm.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    OptimizerConfig,
)
from vlm.training.monitoring.reporter import read_records
from vlm.training.progress import Progress
from vlm.training.safety.skipped import SKIPPED_NAME


def steps_of(run_folder):
    return sorted(path.name for path in (run_folder / "checkpoints").iterdir())


def test_reports_evaluates_and_saves_when_due_and_at_the_end(inputs, tmp_path):
    build_run(config(inputs, tmp_path)).fit()
    assert list(losses(tmp_path)) == [2, 4, 6, 7]
    assert list(losses(tmp_path, "val/en/text_to_image/recall@1")) == [3, 6, 7]
    assert steps_of(tmp_path) == ["step-00000005", "step-00000007"]
    assert all(rate > 0 for rate in losses(tmp_path, "samples_per_s").values())
    assert all(scale <= 100 for scale in losses(tmp_path, "logit_scale").values())


def test_the_learning_rate_is_that_of_the_schedule(inputs, tmp_path):
    build_run(config(inputs, tmp_path, optimizer=OptimizerConfig(learning_rate=0.25))).fit()
    rates = losses(tmp_path, "learning_rate")
    assert rates[2] == 0.25
    assert rates[4] > rates[6] > rates[7] > 0


def test_going_on_takes_the_remaining_steps_only(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path))
    replace(run, progress=Progress(4, 4 * BATCH)).fit()
    assert list(losses(tmp_path)) == [6, 7]


def test_a_description_names_model_data_loss_ranks_and_steps(inputs, tmp_path):
    text = build_run(config(inputs, tmp_path)).describe()
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "model", "data", "loss", "ranks", "scored", "watched", "steps",
    ]  # fmt: skip
    assert "12 samples in 3 shards; captions in zh, en" in text
    assert "0 to 7 of 4 samples" in text
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def damaged(inputs, tmp_path_factory):
    """The same inputs, with images that cannot be decoded: two of twelve."""
    folder = tmp_path_factory.mktemp("damaged")
    samples = make_samples(12)
    for number in (3, 8):
        samples[number] = make_sample(number, image=b"\x89PNG\r\n\x1a\n and no image")
    write_split(folder / "data", samples)
    (folder / "tokenizer").symlink_to(inputs / "tokenizer")
    return folder


def damaged_config(damaged, run_folder, **changes):
    data = DataConfig(
        folder=damaged / "data", batch_size=BATCH, workers=0, **{"allowed_share": 0.01} | changes
    )
    return config(damaged, run_folder, data=data, evaluation=EvaluationConfig())


@pytest.mark.parametrize("saved", [5, 100], ids=["from a checkpoint", "from the start"])
def test_skipped_samples_are_listed_and_resuming_lists_the_same(damaged, tmp_path, saved):
    settings = damaged_config(damaged, tmp_path / "whole")
    build_run(settings).fit()
    records = read_records(tmp_path / "whole" / SKIPPED_NAME)
    # Two epochs of three steps, and the first step of the third.
    assert len([record for record in records if record["step"] <= 6]) >= 4
    assert {record["uid"] for record in records} == {"sample-0003", "sample-0008"}
    for record in records:
        assert record["uid"] in record["reason"]
        assert record["address"].startswith(str(damaged / "data" / "train-0000"))

    def end(encoder):
        raise KeyboardInterrupt

    halved = replace(
        settings,
        run_folder=tmp_path / "halved",
        report_every=1,
        checkpoint=CheckpointConfig(every_steps=saved),
    )
    run = build_run(replace(halved, evaluation=EvaluationConfig(every_steps=6, split="train")))
    with pytest.raises(KeyboardInterrupt):
        replace(run, evaluate=end).fit()
    kept = read_records(tmp_path / "halved" / SKIPPED_NAME)
    assert kept == [record for record in records if record["step"] <= 6]
    build_run(halved, resume="auto").fit()
    assert read_records(tmp_path / "halved" / SKIPPED_NAME) == records


def test_more_skipped_samples_than_allowed_end_the_run_with_the_commonest_reason(damaged, tmp_path):
    run = build_run(damaged_config(damaged, tmp_path, allowed_share=0.00001))
    message = (
        r"^2 of the last \d+ samples could not be used, more than data.allowed_share 1e-05 permits "
        r"\(1 of 100,000\); 2 of them like this one: sample-000[38] \(.*is not one of JPEG, .*"
        r"skipped.jsonl lists all \(after step \d+; nothing is saved yet\)$"
    )
    with pytest.raises(TrainingError, match=message):
        run.fit()
    assert len(read_records(tmp_path / SKIPPED_NAME)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_micro_batches_train_and_report_the_candidates_they_saw(inputs, tmp_path, mode):
    loss = LossConfig(micro_batches=2, accumulation=mode)
    build_run(config(inputs, tmp_path, loss=loss)).fit()
    assert list(losses(tmp_path, "candidates").values()) == [BATCH] * 4
    assert all(0 <= accuracy <= 1 for accuracy in losses(tmp_path, "accuracy").values())


def test_a_run_goes_on_with_other_workers_and_reports(inputs, tmp_path):
    start = config(inputs, tmp_path)
    build_run(start).fit()
    other = {
        "data": replace(start.data, workers=1, keep_decoded=True), "report_every": 1,
        "cpu_threads": 1, "parallel_towers": True,
        "checkpoint": CheckpointConfig(every_steps=3), "evaluation": EvaluationConfig(),
    }  # fmt: skip
    run = build_run(replace(start, **other), resume="auto")
    assert run.progress == Progress(STEPS, STEPS * BATCH)


@pytest.mark.parametrize("loss", [{}, {"micro_batches": 2}], ids=["whole", "micro-batches"])
def test_towers_that_run_at_once_leave_the_same_weights(inputs, tmp_path, loss):
    left = set()
    for parallel in (False, True):
        settings = {"parallel_towers": parallel, "loss": LossConfig(**loss)}
        run = build_run(config(inputs, tmp_path / str(parallel), **settings))
        assert (run.model.text_thread is not None) == parallel
        left.add((run.fit() / "open_clip_model.safetensors").read_bytes())
    assert len(left) == 1


def test_a_start_that_fails_before_its_first_step_leaves_the_folder_free(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path, evaluation=EvaluationConfig()))

    def fail(parts):
        raise DataError("the first image is damaged")

    with pytest.raises(DataError):
        replace(run, step=fail).fit()
    other = config(inputs, tmp_path, seed=5, evaluation=EvaluationConfig())
    assert build_run(other).fit().is_dir()
    with pytest.raises(ConfigError, match="holds a run already"):
        build_run(other)


@pytest.mark.parametrize("languages", [("de",), ("zh", "de"), ("zh-CN",)])
def test_languages_that_no_sample_has_are_refused_with_those_found(inputs, tmp_path, languages):
    settings = config(inputs, tmp_path, captions=CaptionConfig(languages=languages))
    with pytest.raises(ConfigError, match=rf"has {languages[-1]}, but .* captions in en, zh only"):
        build_run(settings)


def test_a_run_on_one_language_pairs_encodes_the_captions_that_are_there(
    inputs, tmp_path, monkeypatch
):
    languages = ("zh", "en")
    samples = [
        replace(each, captions={languages[k % 2]: each.captions[languages[k % 2]]})
        for k, each in enumerate(make_samples(12))
    ]
    folder, encoded = write_split(tmp_path / "data", samples), []
    text_features = DualEncoder.text_features

    def counted(self, tokens):
        encoded.append(len(tokens.ids))
        return text_features(self, tokens)

    monkeypatch.setattr(DualEncoder, "text_features", counted)
    data = DataConfig(folder=folder, batch_size=12, workers=0)
    build_run(config(inputs, tmp_path / "run", data=data, evaluation=EvaluationConfig())).fit()
    assert encoded == [6, 6] * (STEPS + 1)  # once more to count its FLOP
    assert set(losses(tmp_path / "run", "candidates").values()) == {6}


def test_a_batch_is_split_into_parts_of_about_one_size():
    samples = torch.arange(7)
    batch = Batch(
        images=torch.zeros(7, 3, 2, 2),
        texts={"en": TokenBatch(samples[:, None], torch.ones(7, 1, dtype=torch.bool))},
        text_rows={"en": samples},
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
    assert [part.text_rows["en"].tolist() for part in parts] == [[0, 1, 2], [0, 1, 2], [0]]
    assert [len(part.uids) for part in batch.split(1)] == [7]
    assert [len(part.uids) for part in batch.split(9)] == [1] * 7


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt, which is tested here"
)
def test_memory_that_a_step_frees_is_kept_for_the_next_one(inputs, tmp_path):
    script = f"""
import resource, torch
from pathlib import Path
from tests.support.tiny_run import config
from vlm.training.build import build_run
build_run(config(Path({str(inputs)!r}), Path({str(tmp_path)!r})))
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 1 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    # 64 MiB are 32 pages of the largest kind. A few times they may not fit into what is kept.
    assert min(map(int, found.stdout.split())) < 16
