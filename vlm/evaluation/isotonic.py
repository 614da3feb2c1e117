"""Isotonic regression: a rising map from the cosine of a pair to the probability of a match.

Scores of contrastively trained models lie in a narrow band whose place and shape differ from model
to model, so that nothing but their order is taken for granted. Platt's logistic curve needs two
numbers only, but has the wrong shape where some of the "wrong" pairs match unnoticed.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from vlm.errors import VlmError


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCosines:
    """Cosines of texts with images."""

    right: Float[np.ndarray, " right"]
    """Of the pairs that belong together."""
    wrong: Float[np.ndarray, " wrong"]
    """Of the others, or of a sample of them."""

    def weighted(
        self, prior: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return all cosines in rising order, 1 for right and 0 for wrong, and their weights.

        All right pairs together weigh `prior`, all wrong ones the rest of 1: their numbers in a
        benchmark say nothing of their shares where a model will be used.

        Raises:
            VlmError: the prior is not between 0 and 1, or there are no right or no wrong pairs.
        """
        right, wrong = len(self.right), len(self.wrong)
        if not 0 < prior < 1:
            raise VlmError(f"the prior is {prior}; expected a share between 0 and 1")
        if not right or not wrong:
            raise VlmError(
                f"found {right} right and {wrong} wrong pairs; expected at least one of each"
            )
        x = np.concatenate([self.right, self.wrong]).astype(np.float64)
        is_right = np.repeat([1.0, 0.0], [right, wrong])
        weight = np.repeat([prior / right, (1 - prior) / wrong], [right, wrong])
        order = np.argsort(x, kind="stable")
        return x[order], is_right[order], weight[order]


def fit_map(
    cosines: PairCosines, *, prior: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the knots (cosines, probabilities) of the map, two for each of its steps.

    The lowest and the highest step may hold pairs of one kind only; they count half a pair of the
    other kind as well, because what was seen a few times is not certain.

    Args:
        cosines: Right and wrong pairs; at least one of each.
        prior: Share of right pairs, between 0 and 1, at which the probabilities shall be right.

    Raises:
        VlmError: there are no right or no wrong pairs, or the prior is no such share.
    """
    x, is_right, weight = cosines.weighted(prior)
    starts, values = pool_adjacent_violators(x, is_right, weight)
    ends = np.append(starts[1:], len(x)) - 1
    mass = np.add.reduceat(weight, starts)
    half_right, half_wrong = prior / len(cosines.right) / 2, (1 - prior) / len(cosines.wrong) / 2
    if values[0] == 0:
        values[0] = min(half_right / (mass[0] + half_right), values[1])
    if values[-1] == 1:
        values[-1] = max(mass[-1] / (mass[-1] + half_wrong), values[-2])
    return np.stack([x[starts], x[ends]], axis=1).reshape(-1), np.repeat(values, 2)


def pool_adjacent_violators(
    x: Float[np.ndarray, " points"],
    y: Float[np.ndarray, " points"],
    weight: Float[np.ndarray, " points"],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Fit the non-decreasing step function with the least weighted squared error.

    Points with equal `x` share their value. Steps whose means do not rise are pooled until all
    do (Barlow, Bartholomew, Bremner and Brunk 1972).

    Args:
        x: Places in rising order; at least one.
        y: What was seen there.
        weight: Positive weights.

    Returns:
        The first point of every step, and the strictly rising values of the steps.
    """
    first = _first_of_equals(x)
    masses = np.add.reduceat(weight, first)
    sums = np.add.reduceat(weight * y, first)
    steps: list[tuple[int, float, float]] = []  # first point, mean, mass
    for place, total, weighs in zip(first.tolist(), sums.tolist(), masses.tolist(), strict=True):
        start, mean, mass = place, total / weighs, weighs
        while steps and steps[-1][1] >= mean:
            start, earlier, earlier_mass = steps.pop()
            mean = (mass * mean + earlier_mass * earlier) / (mass + earlier_mass)
            mass += earlier_mass
        steps.append((start, mean, mass))
    return np.array([step[0] for step in steps]), np.array([step[1] for step in steps])


def threshold_for(cosines: PairCosines, *, prior: float, precision: float) -> float:
    """Return the lowest cosine from which on right pairs have at least the share `precision`.

    Raises:
        VlmError: the precision is not a share, no cosine reaches it, or as in `fit_map`.
    """
    if not 0 < precision <= 1:
        raise VlmError(f"the precision is {precision}; expected a share above 0, at most 1")
    x, is_right, weight = cosines.weighted(prior)
    first = _first_of_equals(x)
    right_from_here = np.cumsum((weight * is_right)[::-1])[::-1]
    found = (right_from_here / np.cumsum(weight[::-1])[::-1])[first]
    reached = found >= precision - 1e-12  # sums of many weights are not exact
    if not reached.any():
        raise VlmError(
            f"no cosine reaches the precision {precision} at the prior {prior}; the best precision "
            f"is {found.max():.4f}"
        )
    return float(x[first][reached][0])


def _first_of_equals(x: Float[np.ndarray, " points"]) -> NDArray[np.int64]:
    return np.flatnonzero(np.append(True, np.diff(x) > 0)).astype(np.int64)
