"""Calibrate a model on held-out pairs: from the cosine of a pair to the probability of a match.

The map is an isotonic regression. Cosines of contrastively trained models lie in a narrow band
whose place and shape differ from model to model, so that nothing but their order is assumed.
Platt's logistic curve needs two numbers only, but has the wrong shape where some of the "wrong"
pairs match unnoticed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from vlm.calibration import Calibration
from vlm.embedding.embedder import Embedder
from vlm.errors import DataError, VlmError
from vlm.evaluation.config import CalibrationPlan
from vlm.evaluation.retrieval.pairs import RetrievalPairs, linked_groups

_TILE = 1 << 16  # pairs whose vectors are multiplied at a time
_BINS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCosines:
    """Cosines of texts with images."""

    correct: Float[np.ndarray, " correct"]
    """Of the pairs that belong together."""
    wrong: Float[np.ndarray, " wrong"]
    """Of the others, or of a sample of them."""

    def weighted(
        self, prior: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return all cosines in rising order, 1 for correct and 0 for wrong, and their weights.

        All correct pairs together weigh `prior`, all wrong ones the rest of 1: their numbers in a
        benchmark say nothing of their ratio where a model will be used.

        Raises:
            VlmError: the prior is not between 0 and 1, or there are no correct or no wrong pairs.
        """
        correct, wrong = len(self.correct), len(self.wrong)
        if not 0 < prior < 1:
            raise VlmError(f"the prior is {prior}; expected a number between 0 and 1")
        if not correct or not wrong:
            raise VlmError(
                f"found {correct} correct and {wrong} wrong pairs; expected at least one of each"
            )
        x = np.concatenate([self.correct, self.wrong]).astype(np.float64)
        is_correct = np.repeat([1.0, 0.0], [correct, wrong])
        weight = np.repeat([prior / correct, (1 - prior) / wrong], [correct, wrong])
        order = np.argsort(x, kind="stable")
        return x[order], is_correct[order], weight[order]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reliability:
    """How reliable a calibration is on pairs that it was not fitted on."""

    correct: int
    wrong: int
    """Pairs it was checked with."""
    calibration_error: float
    """Expected calibration error in [0, 1]: the mean distance of the stated from the true ratio
    over 15 bins of equal width (Guo et al. 2017, equation 3), at the calibration's prior."""
    precision: float
    """At the threshold and the prior; 0 if no pair reaches the threshold."""
    recall: float
    """Ratio of the correct pairs that reach the threshold."""


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
        VlmError: a half has no correct or no wrong pairs, or no cosine reaches the precision.
    """
    images = embedder.encode_image(pairs.images, show_progress_bar=show_progress_bar)
    half = halves_of_images(pairs, seed=plan.seed)
    fitting, checking = [], {}
    for language, of_language in pairs.texts.items():
        texts = embedder.encode_text(of_language.texts, show_progress_bar=show_progress_bar)
        matches = of_language.matches
        fitting.append(_cosines_of_part(texts, images, matches, half, plan))
        checking[language] = _cosines_of_part(texts, images, matches, ~half, plan)
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
            "correct_pairs": len(fitted.correct),
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
    """Return the cosines of all correct pairs, and of the wrong ones or a random sample of them.

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
    correct = np.unique(matches[:, 0] * len(images) + matches[:, 1])
    if size <= most_wrong:
        drawn = np.arange(size)
    else:
        drawn = np.unique(np.random.default_rng(seed).integers(0, size, most_wrong))
    wrong = np.setdiff1d(drawn, correct, assume_unique=True)
    return PairCosines(
        correct=_cosines_at(correct, texts, images), wrong=_cosines_at(wrong, texts, images)
    )


def fit_map(
    cosines: PairCosines, *, prior: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the knots (cosines, probabilities) of the map, two for each of its steps.

    The lowest and the highest step may hold pairs of one kind only; they count half a pair of the
    other kind as well, because what was seen a few times is not certain.

    Raises:
        VlmError: there are no correct or no wrong pairs, or the prior is not between 0 and 1.
    """
    x, is_correct, weight = cosines.weighted(prior)
    first = _first_of_equals(x)  # pairs of one cosine share their value
    masses = np.add.reduceat(weight, first)
    means = np.add.reduceat(weight * is_correct, first) / masses
    fitted = isotonic_regression(means, weights=masses)
    blocks = fitted.blocks[:-1]  # where each step begins; the last entry is the end
    starts, values = first[blocks], fitted.x[blocks]
    ends = np.append(starts[1:], len(x)) - 1
    mass = np.add.reduceat(weight, starts)
    half_correct = prior / len(cosines.correct) / 2
    half_wrong = (1 - prior) / len(cosines.wrong) / 2
    if values[0] == 0:
        values[0] = min(half_correct / (mass[0] + half_correct), values[1])
    if values[-1] == 1:
        values[-1] = max(mass[-1] / (mass[-1] + half_wrong), values[-2])
    return np.stack([x[starts], x[ends]], axis=1).reshape(-1), np.repeat(values, 2)


def threshold_for(cosines: PairCosines, *, prior: float, precision: float) -> float:
    """Return the lowest threshold that reaches the precision.

    Raises:
        VlmError: the precision is not in (0, 1], no threshold reaches it, or as in `fit_map`.
    """
    if not 0 < precision <= 1:
        raise VlmError(f"the precision is {precision}; expected a number above 0, at most 1")
    x, is_correct, weight = cosines.weighted(prior)
    first = _first_of_equals(x)
    correct_from_here = np.cumsum((weight * is_correct)[::-1])[::-1]
    found = (correct_from_here / np.cumsum(weight[::-1])[::-1])[first]
    reached = found >= precision - 1e-12  # sums of many weights are not exact
    if not reached.any():
        raise VlmError(
            f"no cosine reaches the precision {precision} at the prior {prior}; the best precision "
            f"is {found.max():.4f}"
        )
    return float(x[first][reached][0])


def reliability(calibration: Calibration, cosines: PairCosines) -> Reliability:
    """Check a calibration by pairs that it was not fitted on.

    Raises:
        VlmError: there are no correct or no wrong pairs.
    """
    x, is_correct, weight = cosines.weighted(calibration.prior)
    stated = calibration.probability(x)
    bins = np.minimum((stated * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weight * (stated - is_correct), minlength=_BINS)
    found = x >= calibration.threshold
    hits, taken = float((weight * is_correct)[found].sum()), float(weight[found].sum())
    return Reliability(
        correct=len(cosines.correct),
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
    pairs = np.stack([text, (np.cumsum(own) - 1)[kept[:, 1]]], axis=1)
    limits = {"most_wrong": plan.most_wrong, "seed": plan.seed}
    return pair_cosines(texts[of_text], images[own], pairs, **limits)


def _joined(parts: Sequence[PairCosines]) -> PairCosines:
    correct, wrong = zip(*((part.correct, part.wrong) for part in parts), strict=True)
    return PairCosines(correct=np.concatenate(correct), wrong=np.concatenate(wrong))


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


def _first_of_equals(x: Float[np.ndarray, " points"]) -> NDArray[np.int64]:
    return np.flatnonzero(np.append(True, np.diff(x) > 0)).astype(np.int64)
