"""Recall of approximate search against the time it takes, as an image."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from vlm.evaluation.indexes import SweepPoint
from vlm.reports.plots import figure_png

_COLUMNS = 3
_MARKERS = "osD^vP*X"


def recall_latency_png(
    panels: Mapping[str, Mapping[str, Sequence[SweepPoint]]],
    *,
    exact_milliseconds: Mapping[str, float],
    k: int,
    title: str,
) -> bytes:
    """Draw a panel a search and in it a line an index, up and to the left is better; return a PNG.

    Args:
        panels: By the name of the search and that of the index, what `sweep` returned; at least
            one search.
        exact_milliseconds: By search, the time of an exact one, drawn as a vertical line.
        k: The number of neighbours that was looked for.
        title: Stands over the plot.
    """
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.4, 3.4 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    factories = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    handles = {}
    for axes, (search, curves) in zip(grid.flat, panels.items(), strict=False):
        exact = axes.axvline(exact_milliseconds[search], color="#777777", linestyle="--")
        handles["exact search"] = exact
        for factory, points in curves.items():
            number = factories.index(factory)
            (handles[factory],) = axes.plot(
                [point.milliseconds_per_query for point in points],
                [point.ann_recall for point in points],
                marker=_MARKERS[number % len(_MARKERS)],
                color=f"C{number % 10}",
                markersize=4.5,
                linewidth=1.3,
                alpha=0.85,
            )
        axes.set(title=search, xscale="log", xlabel="ms per query, one thread", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3, which="both")
    for number in range(rows):
        grid[number, 0].set_ylabel(f"fraction of the {k} nearest found")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure_png(figure)
