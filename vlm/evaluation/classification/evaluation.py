"""Zero-shot classification: vectors of classes from prompts, compared with images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from vlm.embedding.bulk import BulkEmbedder
from vlm.errors import VlmError
from vlm.evaluation.classification.metrics import Classification, score_classification
from vlm.evaluation.classification.prompts import prompts_of

_PROMPTS_AT_A_TIME = 1 << 15

Names = Sequence[str | Sequence[str]]
"""A name for every class, or several synonyms."""


def classifier_weights(
    embedder: BulkEmbedder, names: Names, templates: Sequence[str]
) -> Float32[np.ndarray, "classes dim"]:
    """Return a unit vector for every class: the direction of the mean of its prompts' vectors.

    Each name of a class is filled into each template (Radford et al. 2021, section 3.1.4).

    Args:
        embedder: The model.
        names: The names of the classes.
        templates: Texts with `{}` for the name.

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
