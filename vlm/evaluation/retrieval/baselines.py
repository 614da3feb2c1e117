"""What chance and raw pixels find: the baselines that a model must beat."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Int64
from PIL import Image

from vlm.data.sample import Sample
from vlm.evaluation.retrieval.metrics import (
    CUTOFFS,
    DIRECTIONS,
    Ranks,
    first_correct_ranks,
    recall_by_chance,
)
from vlm.evaluation.retrieval.pairs import RetrievalPairs
from vlm.images.decoding import ImageSource, decode_image

SIDE = 12
"""Width and height of the images that are compared, in pixels."""
_FAINT = 1e-6  # an image of one colour is like no other


def chance_scores(pairs: RetrievalPairs, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Return the recalls of random orders under the keys of `evaluate_retrieval`."""
    scores = {}
    for language, own in pairs.texts.items():
        sizes = len(own.texts), len(pairs.images)
        for side, direction in enumerate(DIRECTIONS):
            of_queries = np.unique(own.matches, axis=0)[:, side]
            correct = np.bincount(of_queries, minlength=sizes[side])
            if direction == "image_to_text":  # an image without a caption is no query
                correct = correct[correct > 0]
            for k in cutoffs:
                scores[f"{language}/{direction}/recall@{k}"] = recall_by_chance(
                    correct, candidates=sizes[1 - side], k=k
                )
    return scores


def pixel_ranks(pairs: RetrievalPairs, references: Iterable[Sample]) -> Mapping[str, Ranks]:
    """Return the ranks of nearest neighbours in raw pixels, by language, without any model.

    Images are shrunk to 12 by 12 pixels in RGB, freed of their mean and compared by the cosine of
    their values. A text is as near to an image as the nearest reference that shows one of its
    concepts; a text without a reference ranks every wrong image first. A text and its translation
    have the same concepts, so languages differ only where captions do.

    Args:
        pairs: A benchmark whose images have concepts.
        references: What a model of the same task is trained on.

    Raises:
        DataError: an image cannot be decoded.
    """
    concepts, shrunk = [], []
    for sample in references:
        concepts.append(sample.concept)
        shrunk.append(_shrunk(sample.image))
    names, of_reference = np.unique(np.array(concepts), return_inverse=True)
    order = np.argsort(of_reference, kind="stable")
    gallery = np.stack([_shrunk(image) for image in pairs.images])
    starts = np.searchsorted(of_reference[order], np.arange(len(names)))
    # Of each concept to each image, that of its nearest reference.
    nearness = np.maximum.reduceat(np.stack(shrunk)[order] @ gallery.T, starts, axis=0)
    places = {name: place for place, name in enumerate(names.tolist())}
    found = {}
    for language, own in pairs.texts.items():
        scores = np.full((len(own.texts), len(pairs.images)), -np.inf, np.float32)
        shown = {(text, pairs.concepts[image]) for text, image in own.matches.tolist()}
        for text, concept in shown:
            if concept in places:
                np.maximum(scores[text], nearness[places[concept]], out=scores[text])
        described = np.unique(own.matches[:, 1])
        found[language] = {
            "text_to_image": _ranks(scores, own.matches),
            "image_to_text": _ranks(scores.T, own.matches[:, ::-1])[described],
        }
    return found


def _shrunk(image: ImageSource) -> Float32[np.ndarray, " values"]:
    small = decode_image(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).ravel()
    values -= values.mean()
    unit: Float32[np.ndarray, " values"] = values / max(float(np.linalg.norm(values)), _FAINT)
    return unit


def _ranks(
    scores: Float32[np.ndarray, "queries candidates"], matches: Int64[np.ndarray, "matches 2"]
) -> Int64[np.ndarray, " queries"]:
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return first_correct_ranks(scores, ids, matches)
