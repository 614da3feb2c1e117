"""The quickstart: train on the emoji pictures, score and index what was held out, report."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vlm.data.dataset import ShardedSplit
from vlm.data.sample import Sample
from vlm.embedder import Embedder
from vlm.errors import ConfigError
from vlm.files import write_file
from vlm.reports.contact_sheet import FoundPicture, SheetRow, contact_sheet_svg
from vlm.retrieval.evaluation import evaluate_retrieval, format_scores
from vlm.retrieval.pairs import pairs_of_split
from vlm.search.embeddings import pictures_in_split, read_embeddings, write_embeddings
from vlm.search.index import VectorIndex
from vlm.search.search_index import build_search_index
from vlm.text.caption_ids import text_id
from vlm.training.config import TrainConfig
from vlm.training.plots import plot_loss, plot_recall
from vlm.training.run import BUNDLE_NAME, CONFIG_NAME, train

SEARCHED_SPLIT = "test_style"
BENCHMARKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "test_style": ("test_style", ()),
    "test_style_no_flags": ("test_style", ("group!=flags",)),
    "test_novel": ("test_novel", ()),
    "test_novel_style": ("test_novel_style", ()),
}
"""By name, the split and the conditions of each benchmark."""

FREE_QUERIES = (
    {"zh": "一只猫", "en": "a cat"},
    {"zh": "红色的花", "en": "a red flower"},
    {"zh": "下雨天", "en": "rainy day"},
    {"zh": "开心的笑脸", "en": "happy smiling face"},
    {"zh": "好吃的", "en": "something to eat"},
)
"""Questions that are nobody's caption, for the contact sheet."""

_PICTURES_PER_QUERY = 5


def run_quickstart(config: TrainConfig) -> Path:
    """Train as configured and leave a run folder that a person wants to look at.

    A quickstart that is already in the run folder is replaced; anything else there is an error.

    Returns:
        The report, `report.md` in the run folder.

    Raises:
        VlmError: the run folder holds something else, or a step cannot be done.
    """
    folder, data = config.run_folder, config.data.folder
    if config.evaluation.every_steps == 0:
        raise ConfigError("the quickstart plots recall: evaluation.every_steps must be more than 0")
    _clear(folder)
    started = time.perf_counter()
    bundle = train(config)
    seconds = time.perf_counter() - started
    embedder = Embedder.load(bundle)
    scores = score_benchmarks(embedder, data)
    flat = {f"{name}/{key}": value for name, row in scores.items() for key, value in row.items()}
    write_file(folder / "scores.json", (json.dumps(flat, indent=1) + "\n").encode())
    pictures = pictures_in_split(data, SEARCHED_SPLIT)
    write_embeddings(embedder, pictures, folder / "embeddings", bundle=bundle)
    build_search_index(folder / "embeddings", folder / "index")
    _draw(config, embedder)
    report = folder / "report.md"
    write_file(report, _report(config, embedder, scores, seconds).encode())
    return report


def score_benchmarks(embedder: Embedder, data: Path) -> dict[str, dict[str, float]]:
    """Score a model on every one of `BENCHMARKS`."""
    return {
        name: evaluate_retrieval(
            embedder, pairs_of_split(data, split, languages=embedder.languages, where=where)
        )
        for name, (split, where) in BENCHMARKS.items()
    }


def next_commands(folder: Path) -> list[str]:
    """Return three commands to try on a finished quickstart, as they must be typed here."""
    scripts = Path(sys.prefix) / "bin"
    on_path = shutil.which("vlm") == str(scripts / "vlm")
    prefix = "" if on_path else f"{os.path.relpath(scripts)}/"
    load = f"vlm.load('{folder / BUNDLE_NAME}')"
    return [
        f"{prefix}vlm search {folder / 'index'} --text 一只猫",
        f"{prefix}vlm eval retrieval {folder / BUNDLE_NAME} --split test_novel_style",
        f"{prefix}python -c \"import vlm; print({load}.encode_text(['一只猫', 'a cat']).shape)\"",
    ]


def _clear(folder: Path) -> None:
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"{folder} holds something else than a run; choose another folder")
    shutil.rmtree(folder)


def _draw(config: TrainConfig, embedder: Embedder) -> None:
    folder, split = config.run_folder, config.evaluation.split
    plot_loss(folder, folder / "loss.png")
    recalls = [
        f"{split}/{language}/text_to_image/recall@{k}"
        for language in embedder.languages
        for k in (1, 10)
    ]
    plot_recall(folder, folder / "recall.png", names=recalls)
    sheet = contact_sheet_svg(
        _sheet_rows(config, embedder),
        title="A drawing style never seen in training: what each query finds. Green: right.",
    )
    write_file(folder / "contact_sheet.svg", sheet.encode())


def _sheet_rows(config: TrainConfig, embedder: Embedder) -> list[SheetRow]:
    samples = list(ShardedSplit(config.data.folder, SEARCHED_SPLIT))
    _, vectors, _ = read_embeddings(config.run_folder / "embeddings")
    index = VectorIndex.build(vectors)
    questions = [
        ({lang: sample.captions[lang][0] for lang in embedder.languages}, sample.concept)
        for sample in _one_of_each_group(samples)
    ]
    questions += [(query, "") for query in FREE_QUERIES]
    rows = []
    for texts, concept in questions:
        hits = index.search(embedder.encode_text(list(texts.values())), _PICTURES_PER_QUERY)
        found = [
            [FoundPicture(samples[i].image, samples[i].concept == concept) for i in row]
            for row in hits.ids.tolist()
        ]
        rows.append(SheetRow(list(zip(texts.values(), found, strict=True))))
    return rows


def _one_of_each_group(samples: Sequence[Sample]) -> list[Sample]:
    """Pick one sample of each group by its hash, so that nobody chose the examples."""
    chosen: dict[str, Sample] = {}
    for sample in sorted(samples, key=lambda sample: text_id(sample.uid)):
        chosen.setdefault(sample.labels.get("group", ""), sample)
    return list(chosen.values())


def _report(
    config: TrainConfig,
    embedder: Embedder,
    scores: Mapping[str, Mapping[str, float]],
    seconds: float,
) -> str:
    parameters = sum(parameter.numel() for parameter in embedder.model.parameters())
    samples = len(ShardedSplit(config.data.folder, config.data.split))
    epochs = config.schedule.steps * config.data.batch_size / samples
    gallery = len(ShardedSplit(config.data.folder, SEARCHED_SPLIT))
    image_tower = config.model.vision_cfg
    hardware = f"{os.cpu_count()} cores ({platform.machine()})"
    if torch.cuda.is_available():
        hardware += f" and {torch.cuda.get_device_name()}"
    commands = "\n".join(next_commands(config.run_folder))
    return f"""# Quickstart report

A dual encoder of {parameters / 1e6:.1f} million parameters (`{image_tower.timm_model_name}`
at {image_tower.image_size} pixels), trained from nothing on {samples} emoji drawings
with Chinese and English captions: {config.schedule.steps} steps of {config.data.batch_size} samples
({epochs:.0f} epochs) in {seconds:.0f} s on {hardware}.

## Retrieval of what was held out

{format_scores(scores)}

* `test_style`: a drawing style that training never saw, {gallery} pictures of concepts that it
  knows from other styles; picking at random finds {1 / gallery:.2%} at rank 1.
* `test_style_no_flags`: the same without flags, which look alike in every style.
* `test_novel`: concepts that training never saw, in the styles it knows.
* `test_novel_style`: concepts that training never saw, in the style that it never saw.

A query is a concept's name; R@k is the share of queries with a right answer among the first k, MR
the mean of a row. The same numbers are in `scores.json`.

## What it finds

Names of concepts picked by a hash, one from each group, then free questions that are nobody's
caption.

![contact sheet](contact_sheet.svg)

## How it learned

![loss](loss.png)
![recall on the validation split](recall.png)

## Try next

```bash
{commands}
```
"""
