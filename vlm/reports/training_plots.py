"""Plots of training runs over their steps or samples, a panel for each of what they recorded."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from vlm.reports.plots import figure_png, in_ascii

Axis = Literal["step", "samples"]
Records = Sequence[Mapping[str, Any]]
"""Of one run, in the order of its steps."""

# Of Okabe and Ito's palette those that are told apart by all kinds of colour vision and on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
_STYLES = ("-", "--", ":")  # another round of the colours takes the next one
_ACROSS = 3
_LONGEST_NAME = 40
_FEW_POINTS = 40  # no more of them are drawn each by itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """Panels that are drawn together."""

    name: str
    """Of its section and, in lower case, of its file."""
    metrics: Mapping[str, str]
    """By regular expression of a whole name, what stands next to its axis."""
    logarithmic: tuple[str, ...] = ()
    """Those whose size matters in orders of magnitude."""


PLOTS = (
    Plot(
        name="Loss",
        metrics={
            "loss": "nats", r"loss/.+": "nats", "accuracy": "ratio", r"accuracy/.+": "ratio",
        },
    ),
    Plot(name="Recall", metrics={r".+/mean_recall": "mean recall"}),
    Plot(
        name="Optimization",
        metrics={
            "logit_scale": "scale", "learning_rate": "rate", r"gradient_norm(/.+)?": "norm",
            r"skipped_.+": "count",
        },
        logarithmic=(r"gradient_norm(/.+)?",),
    ),
    Plot(
        name="Speed",
        metrics={
            "samples_per_s": "samples/s", "data_wait_ratio": "ratio", "mfu": "ratio",
            r"memory_.+": "GiB",
        },
    ),
)  # fmt: skip


_FROM_ZERO = ("count", "GiB", "mean recall", "ratio", "samples/s")


class _Panel(NamedTuple):
    metric: str
    pattern: str
    unit: str
    logarithmic: bool


def plot_png(plot: Plot, runs: Mapping[str, Records], *, by: Axis) -> bytes | None:
    """Draw what the runs, by their names, recorded of a plot's metrics; None if they have none.

    A run keeps its colour and style in all plots. What is not a number is left out.
    """
    panels = _panels(plot, runs)
    if not panels:
        return None
    across = min(len(panels), _ACROSS)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(max(3.6 * across, 4.6), 2.5 * down + 0.4), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    shared: dict[str, Axes] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        if (first := shared.setdefault(panel.pattern, axes)) is not axes:
            axes.sharey(first)
        _draw(axes, panel, runs, by)
    if len(runs) > 1:
        handles = [Line2D([], [], **_look(number)) for number in range(len(runs))]
        names = [_shown(name) for name in runs]
        columns = max(1, round(45 * across / (6 + max(map(len, names)))))  # what has room
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize="small")
    return figure_png(figure)


def _panels(plot: Plot, runs: Mapping[str, Records]) -> list[_Panel]:
    found = dict.fromkeys(
        name
        for records in runs.values()
        for record in records
        for name, value in record.items()
        if value is not None
    )
    return [
        _Panel(name, pattern, unit, pattern in plot.logarithmic)
        for pattern, unit in plot.metrics.items()
        for name in sorted(found)
        if re.fullmatch(pattern, name)
    ]


def _draw(axes: Axes, panel: _Panel, runs: Mapping[str, Records], by: Axis) -> None:
    for number, records in enumerate(runs.values()):
        points = [
            (record[by], value)
            for record in records
            if (value := record.get(panel.metric)) is not None and math.isfinite(value)
        ]
        if not points:
            continue
        along, values = zip(*points, strict=True)
        look = _look(number)
        if len(points) > _FEW_POINTS:
            axes.plot(along, values, color=look["color"], alpha=0.25, linewidth=0.8)
            axes.plot(along, _running_mean(values), linewidth=1.4, **look)
        else:
            axes.plot(along, values, linewidth=1.4, marker="o", markersize=2.5, **look)
    axes.set_title(panel.metric, fontsize="medium")
    axes.set_xlabel(by, fontsize="small")
    axes.set_ylabel(panel.unit, fontsize="small")
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif panel.unit in _FROM_ZERO:
        axes.update_datalim([(0.0, 0.0)], updatex=False)
        axes.autoscale_view()
    if panel.unit == "count":
        axes.update_datalim([(0.0, 1.0)], updatex=False)  # where all are 0
        axes.autoscale_view()
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)


def _running_mean(values: Sequence[float]) -> Float[np.ndarray, " values"]:
    """Return at each value the mean of those around it, a twentieth of all; fewer at the ends."""
    reach = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    places = np.arange(len(values))
    near = np.minimum(reach, np.minimum(places, places[::-1]))  # as many on either side
    mean: Float[np.ndarray, " values"] = (sums[places + near + 1] - sums[places - near]) / (
        2 * near + 1
    )
    return mean


def _look(number: int) -> dict[str, Any]:
    """Return the colour and the style of a run by its place among them."""
    rounds, place = divmod(number, len(_COLOURS))
    return {"color": _COLOURS[place], "linestyle": _STYLES[rounds % len(_STYLES)]}


def _shown(name: str) -> str:
    """Return a run's name as a legend has room for it and its font has letters: the end of it."""
    name = in_ascii(name)
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
