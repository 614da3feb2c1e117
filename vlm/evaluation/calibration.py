"""Calibrate a model on held-out pairs: what its cosines say of a match, and how reliably."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int
from numpy.typing import NDArray

from vlm.calibration import Calibration
from vlm.embedding.embedder import Embedder
from vlm.errors import DataError, VlmError
from vlm.evaluation.config import CalibrationPlan
from vlm.evaluation.isotonic import PairCosines, fit_map, threshold_for
from vlm.evaluation.retrieval.pairs import RetrievalPairs, linked_groups

_TILE = 1 << 16  # pairs whose vectors are multiplied at a time
_BINS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """How far a calibration can be trusted, by pairs that it was not fitted on."""

    right: int
    """Right pairs it was checked with."""
    wrong: int
    """Wrong pairs it was checked with."""
    calibration_error: float
    """Expected calibration error in [0, 1]: the mean distance of the stated from the true share
    over 15 bins of equal width (Guo et al. 2017, equation 3), at the calibration's prior."""
    precision: float
    """Share of right pairs among those from the threshold on, at the prior; 0 where none is."""
    recall: float
    """Share of the right pairs that are from the threshold on."""


def calibrate(
    embedder: Embedder,
    pairs: RetrievalPairs,
    plan: CalibrationPlan,
    *,
    data: Mapping[str, Any] | None = None,
    show_progress_bar: bool = False,
) -> tuple[Calibration, dict[str, Reliability]]:
    """Fit on a random half of the images and their texts, and check with the other half.

    Args:
        embedder: The model.
        pairs: Texts and images that the model was not trained on.
        plan: What to aim at.
        data: Names the data in the calibration's record.
        show_progress_bar: Whether to show progress on stderr.

    Returns:
        The calibration, one for all languages, and its reliability in each and in `all`.

    Raises:
        VlmError: a half has no right or no wrong pairs, or no cosine reaches the precision.
    """
    images = embedder.encode_image(pairs.images, show_progress_bar=show_progress_bar)
    half = halves_of_images(pairs, seed=plan.seed)
    fitting, checking = [], {}
    for language, of_language in pairs.texts.items():
        texts = embedder.encode_text(of_language.texts, show_progress_bar=show_progress_bar)
        parts = [
            _cosines_of_part(texts, images, of_language.matches, own, plan) for own in (half, ~half)
        ]
        fitting.append(parts[0])
        checking[language] = parts[1]
    fitted = _joined(fitting)
    knots, probabilities = fit_map(fitted, prior=plan.prior)
    calibration = Calibration(
        cosines=knots.tolist(),
        probabilities=probabilities.tolist(),
        prior=plan.prior,
        threshold=threshold_for(fitted, prior=plan.prior, precision=plan.precision),
        precision=plan.precision,
        dim=embedder.embed_dim,
        fingerprint=embedder.fingerprint,
        fitted_on={
            **(data or {}),
            "languages": list(pairs.texts),
            "right_pairs": len(fitted.right),
            "wrong_pairs": len(fitted.wrong),
            "seed": plan.seed,
        },
    )
    checking["all"] = _joined(list(checking.values()))
    return calibration, {name: reliability(calibration, c) for name, c in checking.items()}


def halves_of_images(pairs: RetrievalPairs, *, seed: int = 0) -> NDArray[np.bool_]:
    """Divide the images at random so that no text, in any language, matches in both halves.

    Raises:
        DataError: texts join all images, so that there are no two halves.
    """
    matches, count = [], 0
    for of_language in pairs.texts.values():
        matches.append(of_language.matches + np.array([count, 0]))
        count += len(of_language.texts)
    _, group = linked_groups(np.concatenate(matches), texts=count, images=len(pairs.images))
    groups, number = np.unique(group, return_inverse=True)
    if len(groups) < 2:
        raise DataError(
            f"the texts join all {len(group)} images into {len(groups)} group; expected at least "
            "2, one to fit on and one to check with"
        )
    first = np.arange(len(groups)) < len(groups) // 2
    halves: NDArray[np.bool_] = np.random.default_rng(seed).permutation(first)[number]
    return halves


def pair_cosines(
    texts: Float32[np.ndarray, "texts dim"],
    images: Float32[np.ndarray, "images dim"],
    matches: Int[np.ndarray, "matches 2"],
    *,
    most_wrong: int = 1_000_000,
    seed: int = 0,
) -> PairCosines:
    """Return the cosines of all right pairs, and of the wrong ones or a random sample of them.

    Args:
        texts: Unit vectors.
        images: Unit vectors.
        matches: Pairs (text, image) that belong together.
        most_wrong: About how many wrong pairs to look at; all, where there are fewer pairs.
        seed: Decides the sample.

    Raises:
        VlmError: `most_wrong` is less than 1.
    """
    if most_wrong < 1:
        raise VlmError(f"most_wrong is {most_wrong}; expected at least 1")
    size = len(texts) * len(images)
    right = np.unique(matches[:, 0] * len(images) + matches[:, 1])
    if size <= most_wrong:
        drawn = np.arange(size)
    else:
        drawn = np.unique(np.random.default_rng(seed).integers(0, size, most_wrong))
    wrong = np.setdiff1d(drawn, right, assume_unique=True)
    return PairCosines(
        right=_cosines_at(right, texts, images), wrong=_cosines_at(wrong, texts, images)
    )


def reliability(calibration: Calibration, cosines: PairCosines) -> Reliability:
    """Check a calibration by pairs that it was not fitted on.

    Raises:
        VlmError: there are no right or no wrong pairs.
    """
    x, is_right, weight = cosines.weighted(calibration.prior)
    stated = calibration.probability(x)
    bins = np.minimum((stated * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weight * (stated - is_right), minlength=_BINS)
    found = x >= calibration.threshold
    hits, taken = float((weight * is_right)[found].sum()), float(weight[found].sum())
    return Reliability(
        right=len(cosines.right),
        wrong=len(cosines.wrong),
        calibration_error=float(np.abs(gaps).sum()),
        precision=hits / taken if taken else 0.0,
        recall=hits / calibration.prior,
    )


def _cosines_of_part(
    texts: Float32[np.ndarray, "texts dim"],
    images: Float32[np.ndarray, "images dim"],
    matches: Int[np.ndarray, "matches 2"],
    own: NDArray[np.bool_],
    plan: CalibrationPlan,
) -> PairCosines:
    """Return the cosines among the images that `own` marks and the texts that match them."""
    kept = matches[own[matches[:, 1]]]
    of_text, text = np.unique(kept[:, 0], return_inverse=True)
    image = (np.cumsum(own) - 1)[kept[:, 1]]
    return pair_cosines(
        texts[of_text],
        images[own],
        np.stack([text, image], axis=1),
        most_wrong=plan.most_wrong,
        seed=plan.seed,
    )


def _joined(parts: Sequence[PairCosines]) -> PairCosines:
    return PairCosines(
        right=np.concatenate([part.right for part in parts]),
        wrong=np.concatenate([part.wrong for part in parts]),
    )


def _cosines_at(
    pairs: Int[np.ndarray, " pairs"],
    texts: Float32[np.ndarray, "texts dim"],
    images: Float32[np.ndarray, "images dim"],
) -> NDArray[np.float64]:
    found = np.empty(len(pairs))
    for start in range(0, len(pairs), _TILE):
        text, image = np.divmod(pairs[start : start + _TILE], len(images))
        found[start : start + _TILE] = np.einsum("pd,pd->p", texts[text], images[image])
    return found
