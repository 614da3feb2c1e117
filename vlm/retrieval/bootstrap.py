"""Confidence intervals of mean scores, by drawing a benchmark's pictures again and again."""

import numpy as np
from jaxtyping import Float64, Int, Shaped

from vlm.errors import VlmError

_DRAWS_AT_ONCE = 2**22


def bootstrap_interval(
    values_by_query: Shaped[np.ndarray, " queries"],
    groups: Int[np.ndarray, " groups"],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of a mean over queries (Efron 1979, drawn by groups).

    For two models on one benchmark, give the differences of their values: the interval is then
    that of the paired bootstrap, and the models differ where it does not hold 0.

    Args:
        values_by_query: Truth values or finite numbers; for recall@k, `ranks <= k`.
        groups: The picture to which each query belongs. Pictures are drawn, with replacement,
            and bring all their queries, because captions of one picture are not independent.
        level: Share in (0, 1) of the resampled means that lie within the interval.
        resamples: How often to draw.
        seed: Of the draws; the same pictures give the same draws for all values.

    Raises:
        VlmError: there are no queries, some have no group or no finite value, `level` is not
            within (0, 1), or `resamples` is less than 1.
    """
    if not 0 < level < 1:
        raise VlmError(f"the level of the interval is {level}; expected a number between 0 and 1")
    means = resampled_means(values_by_query, groups, resamples=resamples, seed=seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_means(
    values_by_query: Shaped[np.ndarray, " queries"],
    groups: Int[np.ndarray, " groups"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Float64[np.ndarray, " resamples"]:
    """Return the mean over the queries of each resample of the groups.

    Means of several kinds over the same pictures, such as both directions, come from the same
    draws and can be put together resample by resample before quantiles are taken.

    Args:
        values_by_query: As for `bootstrap_interval`, like all that follow.
        groups: The picture of each query.
        resamples: How often to draw.
        seed: Of the draws.

    Raises:
        VlmError: as `bootstrap_interval`.
    """
    values = np.asarray(values_by_query, np.float64)
    if len(values) == 0 or len(values) != len(groups) or resamples < 1:
        raise VlmError(
            f"cannot draw {resamples} times of {len(values)} values with {len(groups)} groups; "
            "expected at least once, one value and as many groups as values"
        )
    if not np.isfinite(values).all():
        raise VlmError(
            f"{int((~np.isfinite(values)).sum())} of {len(values)} values are not finite; "
            "expected finite numbers"
        )
    _, places = np.unique(groups, return_inverse=True)
    totals, sizes = np.bincount(places, values), np.bincount(places)
    rng, count = np.random.default_rng(seed), len(sizes)
    step = max(1, _DRAWS_AT_ONCE // count)
    means = []
    for start in range(0, resamples, step):
        drawn = rng.integers(count, size=(min(step, resamples - start), count), dtype=np.int32)
        means.append(totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(means)
