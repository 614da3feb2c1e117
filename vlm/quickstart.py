"""The quickstart: train on the emoji images, score and index what was held out, report."""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from vlm.data.config import DEFAULT_SPLIT, SourceConfig
from vlm.data.source import Source, open_source
from vlm.embedding.embedder import Embedder
from vlm.embedding.parts import SplitImages, write_embeddings
from vlm.errors import ConfigError
from vlm.evaluation.config import IndexPlan, RetrievalSource
from vlm.evaluation.retrieval.everyday import SHOWN
from vlm.evaluation.retrieval.run import RetrievalRun, evaluate
from vlm.files import write_file
from vlm.reports.document import (
    Block,
    Bullets,
    CodeBlock,
    Document,
    Examples,
    Figure,
    Paragraph,
    Section,
    write_report,
)
from vlm.reports.everyday_report import answered_questions, missed_questions
from vlm.reports.plots import loss_png, recall_png
from vlm.reports.results import RECORD_NAME
from vlm.reports.retrieval_report import retrieval_sections
from vlm.search.search_index import build_search_index
from vlm.training.build import build_run
from vlm.training.config import TrainConfig
from vlm.training.saving.resuming import BUNDLE_NAME, CONFIG_NAME

SEARCHED_SPLIT = "test_style"
BENCHMARKS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "test_style": ("test_style", ()),
    "test_style_no_flags": ("test_style", ("group!=flags",)),
    "test_novel": ("test_novel", ()),
    "test_novel_style": ("test_novel_style", ()),
}
"""By name, the split and the conditions of each benchmark."""

QUESTIONS = "questions.yaml"
"""The file of a data folder with everyday questions, which are asked of `SEARCHED_SPLIT`."""

_INDEX = "HNSW32"  # approximate search, to show what it costs
_ANSWERED, _MISSED = 10, 3  # questions that the report shows with what they find


def run_quickstart(config: TrainConfig) -> tuple[Path, RetrievalRun]:
    """Train as configured and leave a run folder that a person wants to look at.

    A quickstart that is already in the run folder is replaced; anything else there is an error.

    Returns:
        The report, `report.html` in the run folder, and the scores.

    Raises:
        VlmError: the run folder holds something else, or a step cannot be done.
    """
    folder, data = config.run_folder, Path(config.data.folder)
    if config.evaluation.every_steps == 0:
        raise ConfigError("the quickstart plots recall: evaluation.every_steps must be more than 0")
    if folder.exists():
        if any(folder.iterdir()) and not (folder / CONFIG_NAME).is_file():
            raise ConfigError(f"{folder} holds something else than a run; choose another folder")
        shutil.rmtree(folder)
    started = time.perf_counter()
    run = build_run(config)
    if run.evaluate is None:
        raise ConfigError(f"the quickstart plots recall, and {data} has no split to score")
    bundle = run.fit()
    seconds = time.perf_counter() - started
    embedder = Embedder.load(bundle)
    scored = score_benchmarks(embedder, data, bundle=bundle)
    record = json.dumps(scored.as_record(), indent=1, ensure_ascii=False)
    write_file(folder / RECORD_NAME, (record + "\n").encode())
    images = SplitImages(SourceConfig(path=str(data), split=SEARCHED_SPLIT))
    write_embeddings(embedder, images, folder / "embeddings", bundle=bundle)
    build_search_index(folder / "embeddings", folder / "index")
    return write_report(folder, _document(config, embedder, scored, seconds)), scored


def score_benchmarks(embedder: Embedder, data: Path, *, bundle: str | Path = "") -> RetrievalRun:
    """Score a model on every one of `BENCHMARKS`, on the large ones by approximate search too."""
    questions = data / QUESTIONS
    sources = [
        RetrievalSource(
            path=str(data),
            name=name,
            split=split,
            where=where,
            pixels=DEFAULT_SPLIT if split == SEARCHED_SPLIT else None,
            questions=questions if name == SEARCHED_SPLIT and questions.is_file() else None,
        )
        for name, (split, where) in BENCHMARKS.items()
    ]
    large = [name for name, (split, _) in BENCHMARKS.items() if split == SEARCHED_SPLIT]
    run = evaluate(embedder, sources, bundle=bundle)
    run = run.with_indexes(IndexPlan(factories=[_INDEX]), names=large)
    if run.index_error:
        raise run.index_error
    return run


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


def _document(
    config: TrainConfig, embedder: Embedder, scored: RetrievalRun, seconds: float
) -> Document:
    folder, split = config.run_folder, config.evaluation.split
    recalls = [
        f"{split}/{language}/text_to_image/recall@{k}"
        for language in embedder.languages
        for k in (1, 10)
    ]
    training = Section(
        title="Training",
        blocks=[
            Figure(name="loss.png", content=loss_png(folder), alt="Loss over the steps"),
            Figure(
                name="recall.png",
                content=recall_png(folder, names=recalls),
                alt="Recall on the validation split over the steps",
            ),
        ],
    )
    sections = retrieval_sections(scored, examples_of=[SEARCHED_SPLIT])
    first = 1 + bool(scored.everyday)  # of captions, then of questions
    scores, details = sections[:first], sections[first:]
    following = Section(title="Try next", blocks=[CodeBlock("\n".join(next_commands(folder)))])
    return Document(
        title="Quickstart",
        summary=_summary(config, embedder, seconds),
        sections=[
            *_answered(scored),
            *scores,
            *_limits(scored),
            *details,
            training,
            following,
        ],
    )


def _answered(scored: RetrievalRun) -> list[Section]:
    """Return questions that the model answers well."""
    found = scored.benchmarks[SEARCHED_SPLIT]
    if not found.everyday:
        return []
    examples = answered_questions(found.pairs, found.everyday, most=_ANSWERED)
    asked = len(found.everyday.questions)
    answered = " and ".join(
        f"{each.any(axis=1).sum()} of them in {language}"
        for language, each in found.everyday.correct.items()
    )
    return [
        Section(
            title="What it answers",
            blocks=[
                Paragraph(
                    f"Of {asked} everyday questions, which training never saw, these find the most "
                    f"right images among their first {SHOWN}, in a drawing style that training "
                    f"never saw either. A right one is among the first {SHOWN} for {answered}."
                ),
                Examples(title="Questions and what they find", examples=examples),
            ],
        )
    ]


def _limits(scored: RetrievalRun) -> list[Section]:
    """Return what the model cannot do."""
    found, novel = scored.benchmarks[SEARCHED_SPLIT], scored.benchmarks["test_novel_style"]
    recalls = " and ".join(
        f"{novel.evaluation.scores[f'{language}/text_to_image/recall@1']:.0%} in {language}"
        for language in novel.pairs.texts
    )
    blocks: list[Block] = [
        Bullets([
            f"It knows what its captions name: of concepts that it never saw, it finds {recalls} "
            "at rank 1.",
            "It has read names, keywords and sentences made of them: no word order, no numbers, no "
            "negation.",
            "It has seen drawings of 64 pixels, and no photograph.",
        ])
    ]  # fmt: skip
    if found.everyday:
        missed = missed_questions(found.pairs, found.everyday, most=_MISSED)
        blocks.append(Examples(title="Questions that it misses in both languages", examples=missed))
    return [Section(title="What it cannot do", blocks=blocks)]


def _split_of(config: TrainConfig, split: str) -> Source:
    return open_source(SourceConfig(path=str(config.data.folder), split=split))


def _summary(config: TrainConfig, embedder: Embedder, seconds: float) -> list[Paragraph | Bullets]:
    parameters = sum(parameter.numel() for parameter in embedder.bundle.model.parameters())
    samples = len(_split_of(config, config.data.split))
    epochs = config.schedule.steps * config.data.batch_size / samples
    gallery = len(_split_of(config, SEARCHED_SPLIT))
    image_tower = config.model.vision_cfg
    hardware = f"{os.cpu_count()} cores ({platform.machine()})"
    if torch.cuda.is_available():
        hardware += f" and {torch.cuda.get_device_name()}"
    return [
        Paragraph(
            f"A dual encoder with {parameters / 1e6:.1f} million parameters "
            f"(`{image_tower.timm_model_name}` at {image_tower.image_size} pixels), trained from "
            f"scratch on {samples:,} emoji drawings with Chinese and English captions: "
            f"{config.schedule.steps} steps of {config.data.batch_size} samples "
            f"({epochs:.0f} epochs) in {seconds:.0f} s on {hardware}. It is scored by how well "
            "names of concepts retrieve their drawings, on four held-out sets:"
        ),
        Bullets([
            f"`test_style`: a new drawing style, {gallery:,} images of known concepts; picking at "
            f"random finds {1 / gallery:.2%} at rank 1.",
            "`test_style_no_flags`: the same without flags, which look alike in every style.",
            "`test_novel`: new concepts in known styles.",
            "`test_novel_style`: new concepts in the new style.",
        ]),
    ]  # fmt: skip
