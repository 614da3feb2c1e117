"""Plots of training and of evaluations, each as the bytes of a PNG image."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm.errors import DataError
from vlm.evaluation.retrieval.comparison import CosineStatistics, Spread
from vlm.evaluation.retrieval.metrics import DIRECTIONS, NOT_FOUND, Ranks
from vlm.training.monitoring.reporter import METRICS_NAME, read_records

MOST_CLASSES = 1000
"""With more, a class would be narrower than two pixels of the plot of their confusion."""

_MOST_NAMES = 120  # with more classes, names are too small to read
_LONGEST_NAME = 26
_COLUMNS = 3
_STYLES = dict(zip(DIRECTIONS, ("-", "--"), strict=True))
_CORRECT, _WRONG = "#1a7f5a", "#8a8f98"


def figure_png(figure: Figure) -> bytes:
    """Return a figure as a PNG image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def loss_png(run_folder: Path) -> bytes:
    """Draw the loss and the inverse temperature over the steps of a training run.

    Raises:
        DataError: the run has recorded no loss.
    """
    records = _records_with(run_folder, "loss")
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    (loss,) = axes.plot(steps, [record["loss"] for record in records], color="tab:blue")
    axes.set(xlabel="step", ylabel="contrastive loss (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    scale_axes = axes.twinx()
    (scale,) = scale_axes.plot(
        steps, [record["logit_scale"] for record in records], color="tab:orange"
    )
    scale_axes.set_ylabel("logit scale")
    axes.legend([loss, scale], ["loss", "logit scale"], loc="center right")
    return figure_png(figure)


def recall_png(run_folder: Path, *, names: Sequence[str]) -> bytes:
    """Draw recalls over the steps of a training run, one line for each of the recorded `names`.

    Raises:
        DataError: the run has not recorded one of them.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        records = _records_with(run_folder, name)
        steps, recalls = zip(*((record["step"], record[name]) for record in records), strict=True)
        axes.plot(steps, recalls, marker="o", label=name)
    axes.set(xlabel="step", ylabel="recall", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return figure_png(figure)


def recall_curves_png(ranks: Mapping[str, Mapping[str, Ranks]]) -> bytes:
    """Draw the fraction of queries answered within the first k, by benchmark and language."""
    figure, panels = _panels(len(ranks), width=4.2, height=3.3)
    languages = list(dict.fromkeys(name for of_one in ranks.values() for name in of_one))
    handles = {}
    for axes, (benchmark, of_benchmark) in zip(panels, ranks.items(), strict=True):
        for language, of_language in of_benchmark.items():
            for direction in DIRECTIONS:
                k, recalls = _curve(of_language[direction])
                label = f"{language} {direction.replace('_', ' ')}"
                (handles[label],) = axes.step(
                    k, recalls, where="post", linestyle=_STYLES[direction], linewidth=1.6,
                    color=f"C{languages.index(language) % 10}",
                )  # fmt: skip
        axes.set(title=in_ascii(benchmark), xscale="log", xlabel="k", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("R@k")
    across = 2 if len(panels) == 1 else 4
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across)
    return figure_png(figure)


def cosines_png(cosines: Mapping[str, Mapping[str, CosineStatistics]]) -> bytes:
    """Draw for each benchmark and language the cosines of correct and of wrong pairs.

    A thin line goes from the minimum to the maximum, a thick one over the mean plus and minus a
    standard deviation.
    """
    most = max(map(len, cosines.values()))
    figure, panels = _panels(len(cosines), width=4.2, height=1.2 + 0.55 * most)
    for axes, (benchmark, of_benchmark) in zip(panels, cosines.items(), strict=True):
        for place, found in enumerate(of_benchmark.values()):
            first = place == 0  # one entry in the legend for all languages
            _draw_spread(axes, found.correct, place - 0.15, _CORRECT, "correct pairs" * first)
            _draw_spread(axes, found.wrong, place + 0.15, _WRONG, "wrong pairs" * first)
        axes.set_yticks(range(len(of_benchmark)), list(of_benchmark))
        axes.set(title=in_ascii(benchmark), xlabel="cosine", ylim=(len(of_benchmark) - 0.5, -0.5))
        axes.grid(alpha=0.3, axis="x")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure_png(figure)


def confusion_png(
    confusion: Int64[np.ndarray, "found 3"], names: Sequence[str], *, title: str
) -> bytes:
    """Draw what percentage of each class's images was predicted as each class.

    A name that is not ASCII is replaced by the number of its class, because the font may lack its
    letters; beyond 120 classes no name is shown.

    Args:
        confusion: Rows (true class, predicted class, images), each pair of classes once.
        names: The names of the classes; at most `MOST_CLASSES` of them.
        title: Of the plot.
    """
    count = len(names)
    matrix = np.zeros((count, count), np.int64)
    matrix[confusion[:, 0], confusion[:, 1]] = confusion[:, 2]
    images = matrix.sum(axis=1)
    percentages = 100 * matrix / np.maximum(images, 1)[:, None]
    side = float(np.clip(3 + 0.14 * count, 6, 26))  # inches: names stay readable at a page's width
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(percentages, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class (images)", title=title)
    if count <= _MOST_NAMES:
        shown = [_class_name(name, number) for number, name in enumerate(names)]
        size = 9 if count <= 20 else 7.5
        axes.set_xticks(range(count), shown, rotation=90, fontsize=size)
        rows = [f"{name} ({n})" for name, n in zip(shown, images.tolist(), strict=True)]
        axes.set_yticks(range(count), rows, fontsize=size)
        # The minor ticks lie between the classes, where the grid is drawn.
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#dddddd", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    if 1 < count <= 20:
        for row, column in np.argwhere(percentages > 0).tolist():
            axes.text(
                column, row, f"{percentages[row, column]:.0f}", fontsize=8,
                ha="center", va="center",
                color="white" if percentages[row, column] > 60 else "black",
            )  # fmt: skip
    figure.colorbar(drawn, ax=axes, fraction=0.04, label="% of the class's images")
    return figure_png(figure)


def _records_with(run_folder: Path, name: str) -> list[Mapping[str, float | int]]:
    file = run_folder / METRICS_NAME
    records: list[Mapping[str, float | int]] = [each for each in read_records(file) if name in each]
    if not records:
        raise DataError(f"{file} has no record of {name}")
    return records


def _curve(ranks: Int64[np.ndarray, " queries"]) -> tuple[list[int], list[float]]:
    """Return the k at which the recall rises, from k = 1 on, and the recalls."""
    ks, counts = np.unique(ranks, return_counts=True)
    recalls = np.cumsum(counts) / len(ranks)
    found = ks != NOT_FOUND
    k, of_k = ks[found].tolist(), recalls[found].tolist()
    return ([1, *k], [0.0, *of_k]) if not k or k[0] > 1 else (k, of_k)


def _draw_spread(axes: Axes, spread: Spread, y: float, colour: str, label: str) -> None:
    if spread.count == 0:
        return
    axes.plot([spread.min, spread.max], [y, y], color=colour, linewidth=1.2)
    ends = [spread.mean - spread.std, spread.mean + spread.std]
    axes.plot(ends, [y, y], color=colour, linewidth=6, solid_capstyle="butt", label=label or None)
    axes.plot([spread.mean], [y], marker="|", markersize=11, color="black", markeredgewidth=1.5)


def _class_name(name: str, number: int) -> str:
    if not name.isascii():
        return f"class {number}"
    name = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return name.replace("$", r"\$")  # a dollar sign begins a formula


def in_ascii(name: str) -> str:
    """Return a name in letters that a plot's font has, for matplotlib's text."""
    return name.encode("ascii", "replace").decode().replace("$", r"\$")


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    columns = 2 if count == 4 else min(_COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex="all", sharey="all")
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes in grid.flat[:count]:
        axes.tick_params(labelbottom=True)  # even if another row of panels follows
    return figure, list(grid.flat[:count])
