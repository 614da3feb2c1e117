"""The report of `vlm eval index`: approximate beside exact search of stored embeddings."""

from vlm.evaluation.indexes import IndexReport, comparison_rows
from vlm.reports.document import Block, Bullets, Document, Figure, Paragraph, Section, Table
from vlm.reports.index_plot import recall_latency_png

EXPLANATION = (
    "The same queries through FAISS indexes. `ann_recall@10` is the share of the ten nearest "
    "neighbours that the index found; ms is the median time of a query on one thread."
)
"""What stands before the blocks of `index_blocks`."""


def index_blocks(report: IndexReport, *, name: str, number: int | None = None) -> list[Block]:
    """Return the table of the comparisons, what is to be warned of, and the plot of a sweep.

    Args:
        report: What was compared.
        name: What the vectors are of, as it stands over the table.
        number: Tells the plots of a document apart, as `index_1.png`; None for `index.png`.
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
                    title=f"{report.images} images, {report.dim} numbers each",
                ),
                alt=f"Recall of approximate search against its time on {name}",
            )
        )
    return blocks


def index_document(report: IndexReport, *, embeddings: str, model: str) -> Document:
    """Return the whole report of a comparison.

    Args:
        report: What was compared.
        embeddings: The folder that the vectors are from.
        model: Fingerprint of the model that made them.
    """
    plan = report.plan
    return Document(
        title="Exact and approximate search",
        summary=[
            Paragraph(
                f"`{embeddings}` has {report.images:,} images, vectors of {report.dim} numbers."
            )
        ],
        sections=[
            Section(
                title="Recall, time and size",
                blocks=[Paragraph(EXPLANATION), *index_blocks(report, name=embeddings)],
            ),
            Section(
                title="What was asked",
                blocks=[
                    Bullets([
                        f"Indexes: {', '.join(f'`{name}`' for name in plan.factories)}.",
                        *_searches(report),
                        f"Search parameters are tuned to {plan.target_recall:.0%} of the "
                        f"{report.k} nearest neighbours; `auto` may take {plan.memory}.",
                        f"Times: {report.as_record()['timing']}.",
                        f"Weights `{model[:12]}`.",
                    ])
                ],
            ),
        ],
    )  # fmt: skip


def _searches(report: IndexReport) -> list[str]:
    """Say in words what is searched with and in."""
    said = []
    languages = dict.fromkeys(each.language for each in report.comparisons if each.language)
    if languages:
        said.append(f"Images and their main captions in {', '.join(languages)} find each other.")
    if any(each.direction == "image_to_image" for each in report.comparisons):
        said.append("Images find images; none is an answer to itself.")
    return said
