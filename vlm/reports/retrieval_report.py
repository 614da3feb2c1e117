"""The report of a run of `vlm eval retrieval`: scores, languages, indexes, examples, questions."""

from collections.abc import Collection

from vlm.evaluation.bootstrap import LEVEL
from vlm.evaluation.retrieval.cosines import Spread
from vlm.reports.document import (
    Block,
    Bullets,
    Document,
    Examples,
    Figure,
    Paragraph,
    Section,
    Table,
    without_code,
)
from vlm.reports.index_report import EXPLANATION, index_blocks
from vlm.reports.plots import cosines_png, recall_curves_png
from vlm.reports.results import in_words
from vlm.reports.retrieval_examples import MISSED_BEYOND, drawn_examples
from vlm.reports.retrieval_run import RetrievalRun, ScoredBenchmark
from vlm.reports.score_tables import score_rows


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
    """Return the sections of a run's report, those without content left out.

    Args:
        run: What was scored.
        examples_of: Names of the benchmarks to show examples of; None for all.
    """
    shown = run.benchmarks if examples_of is None else examples_of
    sections = [
        _scores(run), _languages(run), _indexes(run), *_examples(run, shown), _questions(run)
    ]  # fmt: skip
    return [section for section in sections if section.blocks]


def _scores(run: RetrievalRun) -> Section:
    evaluations = {name: scored.evaluation for name, scored in run.benchmarks.items()}
    header, rows = score_rows(
        {name: found.scores for name, found in evaluations.items()},
        {name: found.intervals for name, found in evaluations.items()},
    )
    return Section(
        title="Scores",
        blocks=[
            Table(header=header, rows=rows, text_columns=3),
            Bullets([
                "R@k is the share of queries with a right answer among the first k, MR the mean of "
                "a row's R@k, MRR the mean of 1 / rank. Ranks are exact, among all candidates.",
                f"± is half the width of the {LEVEL:.0%} bootstrap interval, for which images "
                "are drawn together with all texts and images that right pairs link them to.",
            ]),
            Figure(
                name="recall_curves.png",
                content=recall_curves_png({n: found.ranks for n, found in evaluations.items()}),
                alt="Share of queries answered within the first k, for each benchmark, language "
                "and direction",
            ),
        ],
    )  # fmt: skip


def _languages(run: RetrievalRun) -> Section:
    blocks: list[Block] = []
    agreement = [
        [name, pair.replace("/", " and "), f"{found['translations']:,}",
         *(f"{value:.3f}" for key, value in found.items() if key != "translations")]
        for name, scored in run.benchmarks.items()
        for pair, found in scored.evaluation.agreement.items()
    ]  # fmt: skip
    if agreement:
        first = next(s.evaluation.agreement for s in run.benchmarks.values()
                     if s.evaluation.agreement)  # fmt: skip
        keys = [key for key in next(iter(first.values())) if key != "translations"]
        header = ["benchmark", "languages", "translations", *map(_agreement_name, keys)]
        blocks += [
            Paragraph(
                "Do a text and its translation find the same image first, right or wrong, and "
                "do both find a right one among their first k?"
            ),
            Table(header=header, rows=agreement, text_columns=2),
        ]
    reading = next(iter(run.benchmarks.values())).evaluation.reading
    bias = f", plus {reading.logit_bias:.4g}" if reading.logit_bias else ""
    spreads = [
        [name, language, which, *_spread_cells(spread)]
        for name, scored in run.benchmarks.items()
        for language, found in scored.evaluation.cosines.items()
        for which, spread in (("right", found.correct), ("wrong", found.wrong))
    ]
    header = ["benchmark", "language", "pairs", "number", "mean", "deviation", "least", "greatest"]
    cosines = {name: scored.evaluation.cosines for name, scored in run.benchmarks.items()}
    blocks += [
        Paragraph(
            "Cosines of all texts with all images. Languages whose right pairs lie apart need "
            f"thresholds of their own. Logits are {reading.logit_scale:.4g} times as large{bias}."
        ),
        Table(header=header, rows=spreads, text_columns=3),
        Figure(
            name="cosines.png",
            content=cosines_png(cosines),
            alt="Cosines of right and of wrong pairs, for each benchmark and language",
        ),
    ]
    return Section(title="Languages", blocks=blocks)


def _agreement_name(key: str) -> str:
    return "same image first" if key == "same_image" else key.replace("both@", "both right @")


def _spread_cells(spread: Spread) -> list[str]:
    numbers = (spread.mean, spread.std, spread.min, spread.max)
    return [f"{spread.count:,}", *("-" if spread.count == 0 else f"{n:.3f}" for n in numbers)]


def _indexes(run: RetrievalRun) -> Section:
    blocks: list[Block] = [
        block
        for number, (name, scored) in enumerate(run.benchmarks.items(), start=1)
        if scored.indexes
        for block in index_blocks(scored.indexes, name=name, number=number)
    ]
    explained = [Paragraph(EXPLANATION), *blocks] if blocks else []
    return Section(title="Exact and approximate search", blocks=explained)


def _examples(run: RetrievalRun, names: Collection[str]) -> list[Section]:
    sections = []
    for number, name in enumerate(names, start=1):
        scored = run.benchmarks[name]
        groups = drawn_examples(scored.source.pairs, scored.evaluation)
        blocks: list[Block] = [
            Paragraph(
                "Questions drawn by chance from each kind. A missed question is one whose first "
                f"right answer has a rank above {MISSED_BEYOND}."
            )
        ]
        blocks += [
            Examples(name=f"examples_{number}_{place}.svg", items=group.items, title=group.title)
            for place, group in enumerate(groups, start=1)
        ]
        sections.append(Section(title=f"Found and missed: {name}", blocks=blocks))
    return sections


def _questions(run: RetrievalRun) -> Section:
    header = ["benchmark", "language", "fingerprint", "duplicates", "cleaning"]
    numbers = ["images", "captions", "captions_per_image", "images_without_caption"]
    rows = [
        [
            name, language, question.fingerprint, question.duplicates, question.cleaning,
            *(in_words(getattr(question, key)) for key in numbers),
        ]
        for name, scored in run.benchmarks.items()
        for language, question in scored.evaluation.questions.items()
    ]  # fmt: skip
    header += ["images", "captions", "captions an image", "without caption"]
    reading = next(iter(run.benchmarks.values())).evaluation.reading
    cut = ", ".join(
        f"{scored.evaluation.reading.truncated_share:.2%} of {without_code(name)}"
        for name, scored in run.benchmarks.items()
    )
    transform = ", ".join(f"{key} {value}" for key, value in reading.transform.items())
    files = [without_code(f"{name}: {_files(scored)}.") for name, scored in run.benchmarks.items()]
    return Section(
        title="What was asked, and how it was read",
        blocks=[
            Paragraph("Only scores whose fingerprints are equal compare with each other."),
            Table(header=header, rows=rows, text_columns=5),
            Bullets([
                f"Weights `{reading.model[:12]}`, tokenizer `{reading.tokenizer[:12]}`, vectors of "
                f"{reading.embed_dim} numbers.",
                f"Texts of at most {reading.context_length} tokens; cut were {cut}.",
                f"Images: {transform}.",
                *files,
            ]),
        ],
    )  # fmt: skip


def _files(scored: ScoredBenchmark) -> str:
    """Return in words where a benchmark was read from, how, and what was found in its files."""
    settings = scored.source.source.as_record()
    parts = [f"{scored.source.kind}, {settings.pop('path')}"]
    for name, value in settings.items():
        given = value is not None and value is not False and value not in ("", [], ())
        if given and name not in ("name", "kind"):
            said = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            parts.append(f"{name.replace('_', ' ')} {said}")
    for name, value in scored.source.findings.items():
        if isinstance(value, int):
            parts.append(f"{value:,} {name.replace('_', ' ')}")
        elif name == "notes":
            parts += list(value)
    return "; ".join(parts)
