"""The report of `vlm eval index`: approximate compared with exact search of embeddings."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure as Plot

from vlm.evaluation.indexes import Comparison, IndexReport, SweepPoint
from vlm.reports.document import Block, Bullets, Document, Figure, Paragraph, Section, Table
from vlm.reports.plots import figure_png

_COLUMNS = 3
_MARKERS = "osD^vP*X"

EXPLANATION = (
    "The same queries through FAISS indexes. `ann_recall@10` is the fraction of the ten nearest "
    "neighbours that the index found; ms is the median time per query on one thread."
)
"""To show before the blocks of `index_blocks`."""


def index_blocks(report: IndexReport, *, name: str, number: int | None = None) -> list[Block]:
    """Return the table of the comparisons of the vectors `name`, the warnings, and a sweep's plot.

    `number` is that of the plot in its document, for `index_1.png`; None for `index.png`.
    """
    header, rows = comparison_rows(report.comparisons)
    blocks: list[Block] = [Table(header=header, rows=rows, text_columns=2, caption=name)]
    if report.warnings:
        blocks.append(Bullets(report.warnings))
    if report.curves:
        blocks.append(
            Figure(
                name="index.png" if number is None else f"index_{number}.png",
                content=recall_latency_png(
                    report.curves,
                    exact_milliseconds=report.exact_milliseconds,
                    k=report.k,
                    title=f"{report.images} images, {report.dim} dimensions",
                ),
                alt=f"Recall of approximate search against its time on {name}",
            )
        )
    return blocks


def index_document(report: IndexReport, *, embeddings: str, model: str) -> Document:
    """Return the whole report of a comparison of vectors in `embeddings`, made by `model`."""
    plan, searches = report.plan, []
    languages = dict.fromkeys(each.language for each in report.comparisons if each.language)
    if languages:
        searches.append(f"Images and their main captions in {', '.join(languages)}, both ways.")
    if any(each.direction == "image_to_image" for each in report.comparisons):
        searches.append("Images among the other images.")
    return Document(
        title="Exact and approximate search",
        summary=[
            Paragraph(
                f"`{embeddings}` has {report.images:,} images of {report.dim} dimensions."
            )
        ],
        sections=[
            Section(
                title="Recall, time and size",
                blocks=[Paragraph(EXPLANATION), *index_blocks(report, name=embeddings)],
            ),
            Section(
                title="Protocol",
                blocks=[
                    Bullets([
                        f"Indexes: {', '.join(f'`{name}`' for name in plan.factories)}.",
                        *searches,
                        f"Search parameters are tuned to find {plan.target_recall:.0%} of the "
                        f"{report.k} nearest neighbours; memory limit of `auto`: {plan.memory}.",
                        f"Times: {report.as_record()['timing']}.",
                        f"Weights `{model[:12]}`.",
                    ])
                ],
            ),
        ],
    )  # fmt: skip


def comparison_rows(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Return the header of a table, and a row for each index, direction and language.

    The first two columns are text.
    """
    header = [
        "factory", "search", "R@1 exact, index", "R@10 exact, index",
        "ann_recall@10", "ms exact, index", "bytes each", "build s", "parameters",
    ]  # fmt: skip
    rows = []
    for each in comparisons:
        recalls = [
            f"{each.exact_recall[k]:.3f}, {each.index_recall[k]:.3f}" if each.exact_recall else "-"
            for k in (1, 10)
        ]
        parameters = " ".join(f"{name}={value:g}" for name, value in each.parameters.items())
        rows.append([
            each.factory, each.search, *recalls,
            f"{each.ann_recall[10]:.3f}",
            f"{each.exact_milliseconds_per_query:.4f}, {each.milliseconds_per_query:.4f}",
            f"{each.bytes_per_vector:.0f}", f"{each.build_seconds:.3f}", parameters or "-",
        ])  # fmt: skip
    return header, rows


def recall_latency_png(
    panels: Mapping[str, Mapping[str, Sequence[SweepPoint]]],
    *,
    exact_milliseconds: Mapping[str, float],
    k: int,
    title: str,
) -> bytes:
    """Draw a panel per search with a line per index (up and to the left is better) as a PNG.

    Args:
        panels: By the name of the search and that of the index, what `sweep` returned; at least
            one search.
        exact_milliseconds: By search, the time of an exact one, drawn as a vertical line.
        k: The number of neighbours searched for.
        title: Of the plot.
    """
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Plot(figsize=(4.2 * columns + 0.4, 3.4 * rows + 0.9), layout="constrained")
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
