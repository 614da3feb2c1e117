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

from vlm.data.config import SourceConfig
from vlm.data.sample import Sample
from vlm.data.source import Source, open_source
from vlm.embedding.embedder import Embedder
from vlm.embedding.parts import SplitImages, read_embeddings, write_embeddings
from vlm.errors import ConfigError
from vlm.evaluation.config import IndexPlan, RetrievalSource
from vlm.evaluation.retrieval.run import RetrievalRun, evaluate
from vlm.files import write_file
from vlm.reports.document import (
    Bullets,
    CodeBlock,
    Document,
    Examples,
    Figure,
    Paragraph,
    Section,
    write_report,
)
from vlm.reports.examples import Answer, Example, Found
from vlm.reports.plots import loss_png, recall_png
from vlm.reports.results import RECORD_NAME
from vlm.reports.retrieval_report import retrieval_sections
from vlm.search.index import VectorIndex
from vlm.search.search_index import build_search_index
from vlm.text.caption_ids import text_id
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

FREE_QUERIES = (
    {"zh": "一只猫", "en": "a cat"},
    {"zh": "红色的花", "en": "a red flower"},
    {"zh": "下雨天", "en": "rainy day"},
    {"zh": "开心的笑脸", "en": "happy smiling face"},
    {"zh": "好吃的", "en": "something to eat"},
)
"""Free-form queries, which no image has as its caption."""

_INDEX = "HNSW32"  # approximate search, to show what it costs
_IMAGES_PER_QUERY = 5


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
    sources = [
        RetrievalSource(path=str(data), name=name, split=split, where=where)
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


def _worked_examples(config: TrainConfig, embedder: Embedder) -> Examples:
    """Return names of concepts, one of each group, and free-form queries, with what they find."""
    samples = list(_split_of(config, SEARCHED_SPLIT))
    _, vectors, _ = read_embeddings(config.run_folder / "embeddings")
    index = VectorIndex.build(vectors)
    chosen: dict[str, Sample] = {}  # the first of each group by its hash: the choice is not ours
    for sample in sorted(samples, key=lambda sample: text_id(sample.uid)):
        chosen.setdefault(sample.labels.get("group", ""), sample)
    questions = [
        ({lang: sample.captions[lang][0] for lang in embedder.languages}, sample.concept)
        for sample in chosen.values()
    ]
    questions += [(query, "") for query in FREE_QUERIES]
    items = []
    for texts, concept in questions:
        hits = index.search(embedder.encode_text(list(texts.values())), _IMAGES_PER_QUERY)
        answers = []
        for number, (language, text) in enumerate(texts.items()):
            found = [
                Found(
                    image=samples[place].image,
                    text=samples[place].address,
                    correct=samples[place].concept == concept,
                    cosine=cosine,
                )
                for place, cosine in zip(
                    hits.ids[number].tolist(), hits.scores[number].tolist(), strict=True
                )
            ]
            answers.append(Answer(language=language, query=text, found=found))
        items.append(Example(answers=answers))
    return Examples(
        title="A drawing style never seen in training: what each query finds", examples=items
    )


def _document(
    config: TrainConfig, embedder: Embedder, scored: RetrievalRun, seconds: float
) -> Document:
    folder, split = config.run_folder, config.evaluation.split
    recalls = [
        f"{split}/{language}/text_to_image/recall@{k}"
        for language in embedder.languages
        for k in (1, 10)
    ]
    finds = Section(
        title="What it finds",
        blocks=[
            Paragraph(
                "Names of concepts picked by a hash, one from each group, then free-form queries, "
                "which no image has as its caption."
            ),
            _worked_examples(config, embedder),
        ],
    )
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
    following = Section(title="Try next", blocks=[CodeBlock("\n".join(next_commands(folder)))])
    return Document(
        title="Quickstart",
        summary=_summary(config, embedder, seconds),
        sections=[
            finds,
            *retrieval_sections(scored, examples_of=[SEARCHED_SPLIT]),
            training,
            following,
        ],
    )


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
