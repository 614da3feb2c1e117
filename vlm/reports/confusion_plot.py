"""The confusion of classes as an image: what each class is taken for."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, Int64
from matplotlib.figure import Figure

MOST_CLASSES = 1000
"""With more, a class would be narrower than two dots of the plot, and could not be told apart."""

_MOST_NAMES = 120  # beyond so many, names are too small to read
_LONGEST_NAME = 26


def confusion_png(
    confusion: Int64[np.ndarray, "found 3"], names: Sequence[str], *, title: str
) -> bytes:
    """Draw the shares of each class's images that were given each class; return a PNG.

    A name that the plot's letters cannot show is replaced by the number of its class, and beyond
    120 classes none is shown.

    Args:
        confusion: Rows (right class, given class, images), each pair of classes once.
        names: What to call the classes; at most `MOST_CLASSES` of them.
        title: Stands over the plot.
    """
    count = len(names)
    images, shares = _shares(confusion, count)
    side = float(np.clip(3 + 0.14 * count, 6, 26))  # so that names are read at a page's width
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="given class", ylabel="right class (images)", title=title)
    if count <= _MOST_NAMES:
        shown = [_shown(name, number) for number, name in enumerate(names)]
        size = 9 if count <= 20 else 7.5
        axes.set_xticks(range(count), shown, rotation=90, fontsize=size)
        rows = [f"{name} ({n})" for name, n in zip(shown, images.tolist(), strict=True)]
        axes.set_yticks(range(count), rows, fontsize=size)
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#dddddd", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    if 1 < count <= 20:
        for row, column in np.argwhere(shares > 0).tolist():
            axes.text(
                column, row, f"{shares[row, column]:.0f}", fontsize=8,
                ha="center", va="center",
                color="white" if shares[row, column] > 60 else "black",
            )  # fmt: skip
    figure.colorbar(image, ax=axes, fraction=0.04, label="% of the class's images")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()


def _shares(
    confusion: Int64[np.ndarray, "found 3"], count: int
) -> tuple[Int[np.ndarray, " classes"], Float64[np.ndarray, "classes classes"]]:
    """Return how many images each class has, and what % of them was given each class."""
    matrix = np.zeros((count, count), np.int64)
    matrix[confusion[:, 0], confusion[:, 1]] = confusion[:, 2]
    images = matrix.sum(axis=1)
    return images, 100 * matrix / np.maximum(images, 1)[:, None]


def _shown(name: str, number: int) -> str:
    if not name.isascii():
        return f"class {number}"
    name = name.replace("$", r"\$")  # which opens a formula
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
