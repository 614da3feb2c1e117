"""A zero-shot classification from its source to its record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from vlm.data.config import SourceConfig
from vlm.data.layout import default_split, layout_of
from vlm.embedding.bulk import BulkEmbedder
from vlm.embedding.embedder import Embedder
from vlm.errors import ConfigError, DataError, VlmError
from vlm.evaluation.bootstrap import LEVEL
from vlm.evaluation.classification.dataset import (
    LabelledImages,
    class_folders,
    images_in_class_folders,
    images_of_source,
)
from vlm.evaluation.classification.metrics import (
    Classification,
    ClassificationScores,
    Interval,
    baselines,
    classification_intervals,
    score_classification,
)
from vlm.evaluation.classification.prompts import (
    ClassNames,
    prompts_of,
    read_class_names,
    read_templates,
)
from vlm.evaluation.config import ClassificationSource
from vlm.evaluation.reading import Reading, reading_of
from vlm.storage.places import MissingFileError, is_remote, shown, state_of, within

Names = Sequence[str | Sequence[str]]
"""A name for every class, or several synonyms."""

_OWN_NAMES = "classes.json"
_PROMPTS_AT_A_TIME = 1 << 15
_TIES = "a wrong class with the same score as the true one ranks before it"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationRun:
    """What a bundle scored on labelled images, and all that the scores depend on."""

    bundle: str
    """The bundle's folder."""
    source: ClassificationSource
    images: LabelledImages
    images_sha256: str
    """Of the images and their labels."""
    classes: ClassNames
    templates: Mapping[str, Sequence[str]]
    """By language."""
    reading: Reading
    """How the model takes in the prompts and the images."""
    scores: Mapping[str, Classification]
    """By language."""
    intervals: Mapping[str, Interval]
    """What `classification_intervals` returns for the scores."""

    @property
    def baselines(self) -> dict[str, ClassificationScores]:
        """Return the scores that need no model."""
        return baselines(np.bincount(self.images.labels, minlength=len(self.classes.ids)))

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        ids = self.classes.ids
        return {
            "scores": {language: _record(found, ids) for language, found in self.scores.items()},
            "intervals": {"level": LEVEL, "of": dict(self.intervals)},
            "baselines": {name: found.means() for name, found in self.baselines.items()},
            "protocol": {
                **self.source.as_record(),
                "images": len(self.images.images),
                "left_out": self.images.left_out,
                "classes": len(ids),
                "names": self.classes.names,
                "ties": _TIES,
                "images_sha256": self.images_sha256,
                "templates": self.templates,
                "bundle": self.reading.model,
                "tokenizer": self.reading.tokenizer,
                "context_length": self.reading.context_length,
                "truncated_share": self.reading.truncated_share,
                "dim": self.reading.embed_dim,
                "transform": self.reading.transform,
            },
        }


def evaluate(
    embedder: Embedder | BulkEmbedder, source: ClassificationSource, *, bundle: str | Path = ""
) -> ClassificationRun:
    """Classify labelled images in each language.

    Args:
        embedder: The model; a `BulkEmbedder` to share the work over ranks, which must all call
            this, to keep vectors on disk, or to show progress.
        source: The images, the names of their classes and the prompts.
        bundle: The model's name in the report.

    Raises:
        ConfigError: neither the source nor the bundle names a language.
        DataError: images, class names or templates cannot be read, or do not fit together.
    """
    bulk = BulkEmbedder(embedder) if isinstance(embedder, Embedder) else embedder
    languages = list(dict.fromkeys(source.languages or bulk.embedder.languages))
    if not languages:
        raise ConfigError(
            f"{bundle or 'the bundle'} does not name its languages; give them with --languages"
        )
    if source.images is None and source.split is None:
        config = source.config()
        source = replace(source, split=default_split(config.path, config.split))
    templates = read_templates(source.templates, languages)
    classes, images = _read(source, languages)
    digests = bulk.digests_of(images.images)
    scores = evaluate_classification(
        bulk, images.images, images.labels, classes.names, templates, digests=digests
    )
    prompts: dict[str, None] = {}  # each once, in their order
    for language, names in classes.names.items():
        for of_class in names:
            prompts |= dict.fromkeys(prompts_of(of_class, templates[language]))
    return ClassificationRun(
        bundle=str(bundle),
        source=source,
        images=images,
        images_sha256=images.fingerprint(digests),
        classes=classes,
        templates=templates,
        reading=reading_of(bulk.embedder, list(prompts)),
        scores=scores,
        intervals=classification_intervals(scores, images.labels),
    )


def classifier_weights(
    embedder: BulkEmbedder, names: Names, templates: Sequence[str]
) -> Float32[np.ndarray, "classes dim"]:
    """Return a unit vector for every class: the direction of the mean of its prompts' vectors.

    Each name of a class is filled into each template (Radford et al. 2021, section 3.1.4).

    Raises:
        VlmError: there is no class, a class has no name, or there is no template.
    """
    prompts = [prompts_of(of_class, templates) for of_class in names]
    if not prompts or not all(prompts):
        raise VlmError(
            f"found {len(names)} classes and {len(templates)} templates; expected at least one of "
            "each, and a name for each class"
        )
    rows: list[Float32[np.ndarray, "part dim"]] = []
    at_a_time = max(1, _PROMPTS_AT_A_TIME // max(map(len, prompts)))
    for start in range(0, len(prompts), at_a_time):
        part = prompts[start : start + at_a_time]
        texts = list(dict.fromkeys(text for of_class in part for text in of_class))
        vectors = embedder.encode_text(texts)
        place = {text: number for number, text in enumerate(texts)}
        for of_class in part:
            mean = vectors[[place[text] for text in of_class]].mean(axis=0, dtype=np.float64)
            rows.append((mean / max(np.linalg.norm(mean), 1e-12)).astype(np.float32))
    return np.stack(rows)


def evaluate_classification(
    embedder: BulkEmbedder,
    images: Sequence[bytes | Path],
    labels: Int[np.ndarray, " images"],
    class_names: Mapping[str, Names],
    templates: Mapping[str, Sequence[str]],
    *,
    digests: Sequence[bytes] | None = None,
) -> dict[str, Classification]:
    """Classify images by class names in each language; the results are by language.

    A wrong class with the same score as the true one ranks before it. Every rank of the embedder's
    group must call this, and gets all scores.

    Args:
        embedder: The model; `BulkEmbedder(embedder)` of one that was loaded.
        images: Encoded images or their files.
        labels: The number of each image's class.
        class_names: By language, the names of the classes.
        templates: By language, texts with `{}` for the name.
        digests: What `embedder.digests_of` returned for the images, if already known.

    Raises:
        VlmError: there are no images, a label has no name, or a language has no templates.
        DataError: an image cannot be read.
    """
    if not len(images) or len(images) != len(labels):
        raise VlmError(
            f"found {len(images)} images and {len(labels)} labels; expected the same number of "
            "each, at least one"
        )
    for language, names in class_names.items():
        if labels.min() < 0 or labels.max() >= len(names):
            raise VlmError(
                f"labels are in [{labels.min()}, {labels.max()}]; expected [0, {len(names) - 1}] "
                f"for the {len(names)} classes with names in {language!r}"
            )
        if language not in templates:
            raise VlmError(
                f"there are class names in {language!r}, but templates only in "
                f"{', '.join(templates) or 'no language'}"
            )
    features = embedder.encode_image(images, digests)
    scores = {}
    for language, names in class_names.items():
        weights = classifier_weights(embedder, names, templates[language])
        scores[language] = score_classification(features, weights, labels)
    return scores


def _read(
    source: ClassificationSource, languages: Sequence[str]
) -> tuple[ClassNames, LabelledImages]:
    if source.images is not None:
        folders = class_folders(source.images)
        classes = read_class_names(source.classes or (), languages, folders=folders)
        return classes, images_in_class_folders(source.images, classes.ids)
    config, label = source.config(), source.as_record()["label"]
    classes = read_class_names(source.classes or [_own_names(config)], languages, label=label)
    return classes, images_of_source(config, label=label, class_ids=classes.ids)


def _own_names(config: SourceConfig) -> str:
    """Return the file with the class names of a data folder, which is there."""
    if is_remote(config.path):
        own = within(config.path, _OWN_NAMES)
        there = _is_there(own)
    else:
        own = str(Path(config.path.removeprefix("file://"), _OWN_NAMES))
        there = Path(own).is_file()
    if not there:
        layout_of(config)  # so that missing data is not reported as missing class names
        raise DataError(
            f"{shown(config.path)} has no {_OWN_NAMES}; expected one, or class names by --classes"
        )
    return own


def _is_there(url: str) -> bool:
    try:
        state_of(url)
    except MissingFileError:
        return False
    return True


def _record(scores: Classification, ids: Sequence[str]) -> dict[str, Any]:
    confusion: dict[str, dict[str, int]] = {}  # images by true class and, within it, by predicted
    for true, predicted, images in scores.confusion.tolist():
        confusion.setdefault(ids[true], {})[ids[predicted]] = images
    recalls = zip(ids, scores.class_recall.tolist(), strict=True)
    return {
        **scores.means(),
        "class_recall": {name: None if math.isnan(recall) else recall for name, recall in recalls},
        "confusion": confusion,
    }
