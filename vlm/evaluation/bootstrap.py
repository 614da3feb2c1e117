"""Confidence intervals of mean scores, by drawing a benchmark's images again and again."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, Shaped

from vlm.errors import VlmError

LEVEL = 0.95
"""Ratio of the resampled means within an interval, by default."""
RESAMPLES = 1000
"""How often to draw, by default."""
_DRAWS_AT_ONCE = 2**22  # int32 draws and float64 counts of them: 48 MiB


def interval_of(
    means: Float64[np.ndarray, " resamples"], *, level: float = LEVEL
) -> tuple[float, float]:
    """Return the percentile interval: the bounds that contain the ratio `level` of the means.

    Raises:
        VlmError: `level` is not within (0, 1).
    """
    if not 0 < level < 1:
        raise VlmError(f"the level of the interval is {level}; expected a number between 0 and 1")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_means(
    values_by_query: Sequence[Shaped[np.ndarray, " _"]],
    groups: Sequence[Int[np.ndarray, " _"]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Float64[np.ndarray, "kinds resamples"]:
    """Return means over queries for each resample of the groups, of several kinds of queries.

    Images are drawn with replacement and bring all their queries, because captions of one image
    are not independent (Efron 1979, by groups). All kinds come from the same draws, so that means
    of them can be combined resample by resample before quantiles are taken, such as the mean
    recall of both directions. A resample in which a kind has no query gives its mean over all
    queries. For the paired bootstrap of two models, give the differences of their values: the
    models differ if the interval does not contain 0.

    Args:
        values_by_query: For each kind, booleans or finite numbers; for recall@k, `ranks <= k`.
        groups: For each kind, the image of each query; the same image has the same number.
        resamples: How often to draw.
        seed: Of the draws; the same images give the same draws for all values.

    Raises:
        VlmError: there are no queries, some have no group or no finite value, or `resamples` is
            less than 1.
    """
    for values, of_kind in zip(values_by_query, groups, strict=True):
        if len(values) == 0 or len(values) != len(of_kind) or resamples < 1:
            raise VlmError(
                f"cannot draw {resamples} resamples of {len(values)} values with {len(of_kind)} "
                "groups; expected at least one resample, one value and as many groups as values"
            )
        if not np.isfinite(np.asarray(values, np.float64)).all():
            raise VlmError(
                f"{int((~np.isfinite(values)).sum())} of {len(values)} values are not finite; "
                "expected finite numbers"
            )
    _, places = np.unique(np.concatenate(groups), return_inverse=True)
    count = int(places.max()) + 1
    ends = np.cumsum([len(of_kind) for of_kind in groups])[:-1]
    totals, sizes = np.empty((2, len(groups), count))
    for kind, (values, own) in enumerate(zip(values_by_query, np.split(places, ends), strict=True)):
        totals[kind] = np.bincount(own, np.asarray(values, np.float64), count)
        sizes[kind] = np.bincount(own, minlength=count)
    rng = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // count)
    drawn = np.empty((2, len(groups), resamples))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        draws = rng.integers(count, size=(rows, count), dtype=np.int32)
        # One bincount for all rows: each row counts in a range of its own.
        flat = (draws + (np.arange(rows) * count)[:, None]).ravel()
        times = np.bincount(flat, minlength=rows * count).reshape(rows, count).astype(np.float64)
        drawn[:, :, start : start + rows] = totals @ times.T, sizes @ times.T
    overall = (totals.sum(axis=1) / sizes.sum(axis=1))[:, None]
    means: Float64[np.ndarray, "kinds resamples"] = np.where(
        drawn[1] > 0, drawn[0] / np.maximum(drawn[1], 1), overall
    )
    return means
