"""Plots of an evaluation: how many answers must be looked at, and how right and wrong pairs lie."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm.evaluation.retrieval.comparison import CosineStatistics, Spread
from vlm.evaluation.retrieval.scores import DIRECTIONS, Ranks

_COLUMNS = 3
_STYLES = dict(zip(DIRECTIONS, ("-", "--"), strict=True))
_RIGHT, _WRONG = "#1a7f5a", "#8a8f98"


def recall_curves_png(ranks: Mapping[str, Mapping[str, Ranks]]) -> bytes:
    """Draw for each benchmark the share of queries answered within the first k; return a PNG.

    Args:
        ranks: By benchmark and language; at least one benchmark.
    """
    figure, panels = _panels(len(ranks), width=4.2, height=3.3)
    languages = list(dict.fromkeys(name for of_one in ranks.values() for name in of_one))
    handles = {}
    for axes, (benchmark, of_benchmark) in zip(panels, ranks.items(), strict=True):
        for language, of_language in of_benchmark.items():
            for direction in DIRECTIONS:
                k, shares = _curve(of_language[direction])
                label = f"{language} {direction.replace('_', ' ')}"
                (handles[label],) = axes.step(
                    k, shares, where="post", linestyle=_STYLES[direction], linewidth=1.6,
                    color=f"C{languages.index(language) % 10}",
                )  # fmt: skip
        axes.set(
            title=_title(benchmark), xscale="log", xlabel="k, the answers looked at", ylim=(0, 1.02)
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("R@k")
    across = 2 if len(panels) == 1 else 4
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across)
    return _as_png(figure)


def cosines_png(cosines: Mapping[str, Mapping[str, CosineStatistics]]) -> bytes:
    """Draw for each benchmark and language where cosines of right and wrong pairs lie; a PNG.

    A thin line goes from the least to the greatest, a thick one a deviation to either side of the
    mean.

    Args:
        cosines: By benchmark and language; at least one benchmark.
    """
    most = max(map(len, cosines.values()))
    figure, panels = _panels(len(cosines), width=4.2, height=1.2 + 0.55 * most)
    for axes, (benchmark, of_benchmark) in zip(panels, cosines.items(), strict=True):
        for place, found in enumerate(of_benchmark.values()):
            _draw_spread(axes, found.correct, place - 0.15, _RIGHT, "right pairs" * (not place))
            _draw_spread(axes, found.wrong, place + 0.15, _WRONG, "wrong pairs" * (not place))
        axes.set_yticks(range(len(of_benchmark)), list(of_benchmark))
        axes.set(title=_title(benchmark), xlabel="cosine", ylim=(len(of_benchmark) - 0.5, -0.5))
        axes.grid(alpha=0.3, axis="x")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return _as_png(figure)


def _curve(ranks: Int64[np.ndarray, " queries"]) -> tuple[list[int], list[float]]:
    """Return the k at which the share of answered queries rises, and the shares, from k = 1 on."""
    found, counts = np.unique(ranks, return_counts=True)
    shares = np.cumsum(counts) / len(ranks)
    known = found < np.iinfo(np.int64).max
    k, of_k = found[known].tolist(), shares[known].tolist()
    return ([1, *k], [0.0, *of_k]) if not k or k[0] > 1 else (k, of_k)


def _draw_spread(axes: Axes, spread: Spread, y: float, colour: str, label: str) -> None:
    if spread.count == 0:
        return
    axes.plot([spread.min, spread.max], [y, y], color=colour, linewidth=1.2)
    ends = [spread.mean - spread.std, spread.mean + spread.std]
    axes.plot(ends, [y, y], color=colour, linewidth=6, solid_capstyle="butt", label=label or None)
    axes.plot([spread.mean], [y], marker="|", markersize=11, color="black", markeredgewidth=1.5)


def _title(benchmark: str) -> str:
    """Return a name in letters that the plot's font has."""
    return benchmark.encode("ascii", "replace").decode().replace("$", r"\$")


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    columns = 2 if count == 4 else min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex="all", sharey="all")
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes in grid.flat[:count]:
        axes.tick_params(labelbottom=True)  # also of those above a place that is empty
    return figure, list(grid.flat[:count])


def _as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
