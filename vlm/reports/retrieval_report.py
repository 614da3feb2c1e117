"""The report of a run of `vlm eval retrieval`: scores, languages, indexes, examples, questions."""

from collections.abc import Collection

from vlm.evaluation.bootstrap import LEVEL
from vlm.evaluation.retrieval.metrics import DIRECTIONS, mean_recall
from vlm.evaluation.retrieval.run import RetrievalRun, ScoredBenchmark
from vlm.markdown import markdown_table
from vlm.reports.document import (
    Block,
    Bullets,
    Document,
    Examples,
    Figure,
    Paragraph,
    Section,
    Table,
    score_cell,
    without_code,
)
from vlm.reports.everyday_report import everyday_rows, everyday_section
from vlm.reports.examples import MISSED_BEYOND, drawn_examples
from vlm.reports.index_report import EXPLANATION, comparison_rows, index_blocks
from vlm.reports.plots import cosines_png, recall_curves_png
from vlm.reports.results import in_words


def retrieval_document(run: RetrievalRun) -> Document:
    """Return the whole report of a run."""
    names = ", ".join(run.benchmarks)
    return Document(
        title="Retrieval",
        summary=[Paragraph(f"`{without_code(run.bundle)}` scored on {without_code(names)}.")],
        sections=retrieval_sections(run),
    )


def retrieval_sections(
    run: RetrievalRun, *, examples_of: Collection[str] | None = None
) -> list[Section]:
    """Return the sections with content, with examples of all benchmarks or of `examples_of`."""
    shown = run.benchmarks if examples_of is None else examples_of
    sections = [
        _scores(run), everyday_section(run.everyday), _languages(run), _indexes(run),
        *_examples(run, shown), _protocol(run),
    ]  # fmt: skip
    return [section for section in sections if section.blocks]


def format_run(run: RetrievalRun) -> str:
    """Return a Markdown table of the scores and, for each benchmark with indexes, one of those."""
    header, rows = score_rows(run, with_intervals=False)
    parts = [markdown_table(header, rows, text_columns=3)]
    for name, scored in run.benchmarks.items():
        if scored.everyday:
            table = markdown_table(*everyday_rows({name: scored.everyday}), text_columns=2)
            parts.append(table)
        if scored.indexes:
            table = markdown_table(*comparison_rows(scored.indexes.comparisons), text_columns=2)
            parts.append(f"{name}:\n\n{table}")
    return "\n\n".join(parts)


def score_rows(
    run: RetrievalRun, *, with_intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Return a header and a row for each benchmark, language and direction; text in 3 columns."""
    evaluations = {name: scored.evaluation for name, scored in run.benchmarks.items()}
    keys = {key for found in evaluations.values() for key in found.scores}
    cutoffs = sorted({int(key.rsplit("@", 1)[1]) for key in keys if "@" in key})
    header = ["benchmark", "language", "direction", *(f"R@{k}" for k in cutoffs), "MR"]
    baselines = [
        name
        for name in ("pixels", "chance")
        if any(name in scored.baselines for scored in run.benchmarks.values())
    ]
    header += ["median rank", "MRR", *(f"R@{cutoffs[0]} by {name}" for name in baselines)]
    rows = []
    for benchmark, found in evaluations.items():
        intervals = found.intervals if with_intervals else {}
        others = [run.benchmarks[benchmark].baselines.get(name) for name in baselines]
        for language in sorted({key.split("/")[0] for key in found.scores}, reverse=True):
            for direction in DIRECTIONS:
                of_row = f"{language}/{direction}"
                names = [f"{of_row}/recall@{k}" for k in cutoffs]
                rows.append([
                    benchmark, language, direction.replace("_", " "),
                    *(score_cell(found.scores[name], intervals.get(name)) for name in names),
                    score_cell(mean_recall([found.scores[name] for name in names])),
                    f"{found.scores[f'{of_row}/median_rank']:g}",
                    score_cell(found.scores[f"{of_row}/mrr"]),
                    *("-" if each is None else score_cell(each[names[0]]) for each in others),
                ])  # fmt: skip
    return header, rows


def _scores(run: RetrievalRun) -> Section:
    header, rows = score_rows(run)
    ranks = {name: scored.evaluation.ranks for name, scored in run.benchmarks.items()}
    return Section(
        title="Scores",
        blocks=[
            Table(header=header, rows=rows, text_columns=3),
            Bullets([
                "R@k is the fraction of queries with a correct answer among the first k, MR the "
                "mean of a row's R@k, MRR the mean of 1 / rank. Ranks are exact, among all "
                "candidates.",
                "Pixels are nearest neighbours of images shrunk to 12 x 12 pixels among images of "
                "the same concepts that training saw, and chance is random order in the mean.",
                f"± is half the width of the {LEVEL:.0%} bootstrap interval. An image is "
                "resampled together with all texts and images that correct pairs link it to.",
            ]),
            Figure(
                name="recall_curves.png",
                content=recall_curves_png(ranks),
                alt="Fraction of queries answered within the first k, for each benchmark, "
                "language and direction",
            ),
        ],
    )  # fmt: skip


def _languages(run: RetrievalRun) -> Section:
    reading = next(iter(run.benchmarks.values())).evaluation.reading
    bias = f", plus {reading.logit_bias:.4g}" if reading.logit_bias else ""
    cosines = {name: scored.evaluation.cosines for name, scored in run.benchmarks.items()}
    spreads = []
    for name, of_benchmark in cosines.items():
        for language, found in of_benchmark.items():
            for which, spread in (("correct", found.correct), ("wrong", found.wrong)):
                numbers = (spread.mean, spread.std, spread.min, spread.max)
                cells = ["-" if spread.count == 0 else f"{number:.3f}" for number in numbers]
                spreads.append([name, language, which, f"{spread.count:,}", *cells])
    header = ["benchmark", "language", "pairs", "count", "mean", "std", "min", "max"]
    blocks = [
        *_agreement(run),
        Paragraph(
            "Cosines of all texts with all images. If the correct pairs of two languages differ "
            "in their cosines, each language needs its own threshold. Logits are cosines times "
            f"{reading.logit_scale:.4g}{bias}."
        ),
        Table(header=header, rows=spreads, text_columns=3),
        Figure(
            name="cosines.png",
            content=cosines_png(cosines),
            alt="Cosines of correct and of wrong pairs, for each benchmark and language",
        ),
    ]
    return Section(title="Languages", blocks=blocks)


def _agreement(run: RetrievalRun) -> list[Block]:
    found = {
        (name, pair): agreement
        for name, scored in run.benchmarks.items()
        for pair, agreement in scored.evaluation.agreement.items()
    }
    if not found:
        return []
    names = [name for name in next(iter(found.values())) if name != "translations"]
    titles = [
        "same image first" if name == "same_image" else name.replace("both@", "both correct @")
        for name in names
    ]
    return [
        Paragraph(
            "How often a text and its translation find the same image first, correct or wrong, "
            "and how often both find a correct one among their first k."
        ),
        Table(
            header=["benchmark", "languages", "translations", *titles],
            rows=[
                [benchmark, pair.replace("/", " and "), f"{agreement['translations']:,}",
                 *(score_cell(agreement[name]) for name in names)]
                for (benchmark, pair), agreement in found.items()
            ],
            text_columns=2,
        ),
    ]  # fmt: skip


def _indexes(run: RetrievalRun) -> Section:
    blocks: list[Block] = []
    for number, (name, scored) in enumerate(run.benchmarks.items(), start=1):
        if scored.indexes:
            blocks += index_blocks(scored.indexes, name=name, number=number)
    explained = [Paragraph(EXPLANATION), *blocks] if blocks else []
    return Section(title="Exact and approximate search", blocks=explained)


def _examples(run: RetrievalRun, names: Collection[str]) -> list[Section]:
    explained = Paragraph(
        "Queries drawn at random from each kind; a query is missed if none of its first "
        f"{MISSED_BEYOND} answers is correct."
    )
    sections = []
    for name in names:
        scored = run.benchmarks[name]
        drawn = drawn_examples(scored.pairs, scored.evaluation)
        groups = [Examples(title=title, examples=examples) for title, examples in drawn.items()]
        sections.append(Section(title=f"Examples: {name}", blocks=[explained, *groups]))
    return sections


def _protocol(run: RetrievalRun) -> Section:
    header = ["benchmark", "language", "fingerprint", "duplicates", "cleaning"]
    header += ["images", "captions", "captions per image", "images without caption"]
    numbers = ["images", "captions", "captions_per_image", "images_without_caption"]
    rows = [
        [
            name, language, question.fingerprint, question.duplicates, question.cleaning,
            *(in_words(getattr(question, key)) for key in numbers),
        ]
        for name, scored in run.benchmarks.items()
        for language, question in scored.evaluation.questions.items()
    ]  # fmt: skip
    reading = next(iter(run.benchmarks.values())).evaluation.reading
    truncated = ", ".join(
        f"{scored.evaluation.reading.truncated_share:.2%} of {without_code(name)}"
        for name, scored in run.benchmarks.items()
    )
    transform = ", ".join(f"{key} {value}" for key, value in reading.transform.items())
    files = [without_code(f"{name}: {_files(scored)}.") for name, scored in run.benchmarks.items()]
    return Section(
        title="Protocol",
        blocks=[
            Paragraph("Scores can be compared only if their fingerprints are equal."),
            Table(header=header, rows=rows, text_columns=5),
            Bullets([
                f"Weights `{reading.model[:12]}`, tokenizer `{reading.tokenizer[:12]}`, "
                f"{reading.embed_dim} dimensions.",
                f"Max {reading.context_length} tokens; truncated: {truncated}.",
                f"Image transform: {transform}.",
                *files,
            ]),
        ],
    )  # fmt: skip


def _files(scored: ScoredBenchmark) -> str:
    """Return where a benchmark was read from, how, and what was found in its files."""
    settings = scored.source.as_record()
    parts = [f"{scored.pairs.kind}, {settings.pop('path')}"]
    for name, value in settings.items():
        given = value is not None and value is not False and value not in ("", [], ())
        if given and name not in ("name", "kind"):
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            parts.append(f"{name.replace('_', ' ')} {shown}")
    return "; ".join(parts + scored.pairs.describe_findings())
