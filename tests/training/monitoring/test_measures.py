"""What a run measures of itself: by name, against independent computations."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.builders import make_samples, tiny_tokenizer, write_split
from tests.support.commands import ROOT
from tests.support.tiny_run import config, losses
from vlm.batches.config import CaptionConfig, DataConfig
from vlm.errors import ConfigError
from vlm.losses.plan import LossConfig, LossPlan
from vlm.training.build import build_run
from vlm.training.config import EvaluationConfig, OptimizerConfig, ScheduleConfig
from vlm.training.monitoring.measures import tower_norms
from vlm.training.monitoring.reporter import METRICS_NAME, read_records

LENGTH = 10  # of texts, in tokens: five of the twelve English ones are longer
TERM = r"(image|[a-z]{2})-\w+"
PLACEHOLDERS = {
    "TERM": TERM, "PART": rf"(?!{TERM}$)\w+", "TOWER": "(image|text)", "SPLIT": r"\w+",
    "LANGUAGE": r"[a-z]{2}(_second)?", "DIRECTION": "(text_to_image|image_to_text)", "K": r"\d+",
}  # fmt: skip


def documented():
    """Return the names in the table of docs/training.md, as regular expressions."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = page.split("## What to watch")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) == len(set(names))
    return {
        name: re.sub("[A-Z]+", lambda found: PLACEHOLDERS[found[0]], re.escape(name))
        for name in names
    }


@pytest.mark.slow
def test_the_documentation_lists_the_names_that_a_run_writes_and_no_others(inputs, tmp_path):
    settings = config(
        inputs, tmp_path, captions=CaptionConfig(second=True),
        loss=LossConfig(text_text_weight=0.5, second_weight=0.5),
    )  # fmt: skip
    settings = replace(settings, objectives=replace(settings.objectives, matryoshka=(8,)))
    build_run(settings).fit()
    written = {name for record in read_records(tmp_path / METRICS_NAME) for name in record}
    known = documented()
    rows = {
        name: [row for row, pattern in known.items() if re.fullmatch(pattern, name)]
        for name in written
    }
    assert {name: found for name, found in rows.items() if len(found) != 1} == {}
    assert known.keys() - {found[0] for found in rows.values()} == set()


def test_the_loss_is_the_mean_of_the_languages(inputs, tmp_path):
    build_run(config(inputs, tmp_path, evaluation=EvaluationConfig())).fit()
    for record in read_records(tmp_path / METRICS_NAME):
        of_languages = [record["loss/image-zh"], record["loss/image-en"]]
        assert record["loss"] == pytest.approx(sum(of_languages) / 2)
        accuracies = [record["accuracy/image-zh"], record["accuracy/image-en"]]
        assert record["accuracy"] == pytest.approx(sum(accuracies) / 2)
        assert record["memory_gib"] > 0.05


@pytest.mark.parametrize("max_norm", [1e-3, 1e6])
def test_gradient_norms_of_towers_are_those_before_clipping(
    inputs, tmp_path, monkeypatch, max_norm
):
    """Compared with norms of the gradient as the backward pass left it."""
    optimizer = OptimizerConfig(learning_rate=1e-9, max_gradient_norm=max_norm)
    run = build_run(config(inputs, tmp_path, optimizer=optimizer, report_every=1))
    batch = next(run.loader.read(run.data, 1))
    expected = {}

    def step(parts):
        output = run.step(parts)
        for name in ("visual", "text"):
            tower = getattr(run.start.model, name)
            expected[name] = sum(p.grad.square().sum() for p in tower.parameters()).sqrt()
        return output

    result = replace(run, step=step).train_step(batch, 0)
    assert result.tower_norms["image"] == pytest.approx(expected["visual"].item(), rel=1e-5)
    assert result.tower_norms["text"] == pytest.approx(expected["text"].item(), rel=1e-5)


def test_gradient_norms_of_towers_are_computed_only_where_a_step_is_reported(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path, report_every=2))
    batch = next(run.loader.read(run.data, 1))
    assert [bool(run.train_step(batch, step).tower_norms) for step in (0, 1)] == [False, True]


def test_a_tower_that_cannot_say_what_belongs_to_it_has_no_norm():
    class Whole(nn.Linear):
        def image_groups(self):
            raise ConfigError("no stages")

        def text_groups(self):
            return [list(self.parameters())]

    encoder = Whole(2, 2)
    encoder(torch.ones(1, 2)).sum().backward()
    norms = tower_norms(encoder, torch.tensor(1.0), 1.0)
    assert norms == {"text": pytest.approx(6**0.5)}


LOSSES = {
    "softmax": LossConfig(),
    "ignored": LossConfig(plan=LossPlan(duplicates="ignore")),
    "together": LossConfig(captions="together"),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("samples", "ratio"), [(12, 0.0), (18, 2 / 3)])
def test_the_duplicate_ratio_counts_texts_that_match_another_image_too(
    inputs, tmp_path, loss, samples, ratio
):
    """Of 18 samples of 12 concepts, twelve show a concept that another one shows as well."""
    folder = write_split(tmp_path / "data", make_samples(samples))
    settings = config(
        inputs, tmp_path / "run", loss=loss, evaluation=EvaluationConfig(), report_every=1,
        captions=CaptionConfig(main_ratio=1.0), schedule=ScheduleConfig(steps=1, warmup_steps=0),
        data=DataConfig(folder=folder, batch_size=samples, workers=0),
    )  # fmt: skip
    build_run(settings).fit()
    assert losses(tmp_path / "run", "duplicate_ratio") == {1: pytest.approx(ratio)}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_truncated_ratio_counts_captions_by_language(inputs, tmp_path, workers):
    tokenizer = tiny_tokenizer(context_length=LENGTH)
    tokenizer.save(tmp_path / "tokenizer")
    samples, expected = make_samples(12), {}
    samples[3] = replace(samples[3], captions={"en": samples[3].captions["en"]})
    for language in ("zh", "en"):
        texts = [s.captions[language][0] for s in samples if language in s.captions]
        long = Counter(len(pieces) > LENGTH - 2 for pieces in tokenizer.split(texts))
        expected[language] = long[True] / len(texts)
    assert (expected["zh"], 0 < expected["en"] < 1) == (0, True)
    folder = write_split(tmp_path / "data", samples)
    settings = config(
        inputs, tmp_path / "run", tokenizer=tmp_path / "tokenizer", report_every=1,
        captions=CaptionConfig(main_ratio=1.0), schedule=ScheduleConfig(steps=1, warmup_steps=0),
        data=DataConfig(folder=folder, batch_size=12, workers=workers),
        evaluation=EvaluationConfig(), loss=LossConfig(micro_batches=2),
    )  # fmt: skip
    build_run(settings).fit()
    for language, ratio in expected.items():
        name = f"truncated_ratio/{language}"
        assert losses(tmp_path / "run", name) == {1: pytest.approx(ratio)}


def test_an_evaluation_that_was_cut_off_after_its_checkpoint_is_made_up_for(inputs, tmp_path):
    run = build_run(config(inputs, tmp_path, evaluation=EvaluationConfig(every_steps=5)))

    def end(encoder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(run, evaluate=end).fit()
    build_run(run.config, resume="auto").fit()
    build_run(run.config, resume="auto").fit()  # and is made up for once
    steps = [record["step"] for record in read_records(tmp_path / METRICS_NAME)]
    assert steps == [2, 4, 5, 6, 7, 7]
