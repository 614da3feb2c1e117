"""Plots of a run's `metrics.jsonl`."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vlm.errors import DataError
from vlm.training.reporter import METRICS_NAME, read_metrics


def loss_png(run_folder: Path) -> bytes:
    """Draw the loss and the inverse temperature over the steps; return a PNG.

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
    return _as_png(figure)


def recall_png(run_folder: Path, *, names: Sequence[str]) -> bytes:
    """Draw recalls over the steps, one line for each of the recorded `names`; return a PNG.

    Raises:
        DataError: the run has not recorded one of them.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        records = _records_with(run_folder, name)
        axes.plot(
            [record["step"] for record in records],
            [record[name] for record in records],
            marker="o",
            label=name,
        )
    axes.set(xlabel="step", ylabel="recall", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    return _as_png(figure)


def _as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _records_with(run_folder: Path, name: str) -> list[Mapping[str, float | int]]:
    records = [record for record in read_metrics(run_folder / METRICS_NAME) if name in record]
    if not records:
        raise DataError(f"{run_folder / METRICS_NAME} has no record of {name}")
    return list(records)
