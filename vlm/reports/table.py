"""Results of several evaluations side by side: one table for each question that was asked."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlm.errors import ConfigError, DataError
from vlm.evaluation.retrieval.metrics import mean_recall
from vlm.markdown import markdown_table
from vlm.reports.published import (
    PublishedBenchmark,
    PublishedRow,
    published_benchmarks,
    published_rows,
)
from vlm.reports.results import SCORES, WORDS, Result, difference, in_words

_OTHER = "≠"
_SHORT = {
    name: name.replace("text_to_image/recall", "T to I R").replace(
        "image_to_text/recall", "I to T R"
    )
    for name in SCORES
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of a table."""

    name: str
    recalls: tuple[float | None, ...]
    """In per cent, in the order of `SCORES`; None where it is not known."""
    published: bool = False
    other_question: bool = False
    """Whether it was not asked what the table's first row was asked."""
    remarks: tuple[str, ...] = ()

    @property
    def mean_recall(self) -> float | None:
        """MR: the mean of all six recalls, in per cent; None where one of them is not known."""
        known = [recall for recall in self.recalls if recall is not None]
        return mean_recall(known) if len(known) == len(SCORES) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows that answer one question, but for those that say otherwise."""

    benchmark: str
    language: str
    question: Mapping[str, Any] | None
    """Of the first run; None where no run has the benchmark in this language."""
    rows: Sequence[Row]


def tables_of(
    results: Sequence[Result], *, published: Sequence[str] = (), mixed: bool = False
) -> list[Table]:
    """Put results into one table for each benchmark and language, in the order they come.

    Args:
        results: What the runs scored.
        published: Benchmarks whose published rows are wanted. Each stands beside the runs'
            benchmark of the same name, whatever its case and hyphens, or beside the one that is
            named in `NAME=BENCHMARK`; and alone where no run has it.
        mixed: Whether runs that were asked another question than the first may stand beside it.

    Raises:
        ConfigError: there is nothing to tabulate, or no such published benchmark, or no such NAME.
        DataError: runs were asked different questions, and `mixed` is false.
    """
    of_runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        of_runs.setdefault((result.benchmark, result.language), []).append(result)
    beside = _published_by_place(published, results)
    if not of_runs and not beside:
        raise ConfigError("there is nothing to tabulate; expected folders of runs, or --published")
    return [
        _table(place, of_runs.get(place, []), beside.get(place), mixed)
        for place in dict.fromkeys([*of_runs, *beside])
    ]


def _published_by_place(
    asked: Sequence[str], results: Sequence[Result]
) -> dict[tuple[str, str], PublishedBenchmark]:
    """Return the published benchmarks by the name and language of their table."""
    names = list(dict.fromkeys(result.benchmark for result in results))
    beside: dict[tuple[str, str], PublishedBenchmark] = {}
    for text in asked:
        name, sign, wanted = text.rpartition("=")
        if wanted not in published_benchmarks():
            raise ConfigError(
                f"there are no published rows of {wanted!r}; expected some of "
                f"{', '.join(published_benchmarks())}"
            )
        if sign and name not in names:
            raise ConfigError(f"no run has a benchmark {name!r}; expected one of {names}")
        places = [name] if sign else [each for each in names if _plain(each) == _plain(wanted)]
        benchmark = published_benchmarks()[wanted]
        for place in ((each, benchmark.language) for each in places or [wanted]):
            if beside.setdefault(place, benchmark) is not benchmark:
                raise ConfigError(
                    f"{beside[place].name} and {wanted} are both asked for beside {place[0]}; "
                    "expected one of them"
                )
    return beside


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _table(
    place: tuple[str, str],
    results: Sequence[Result],
    published: PublishedBenchmark | None,
    mixed: bool,
) -> Table:
    rows = []
    for result in results:
        first = results[0]
        other = result.question["fingerprint"] != first.question["fingerprint"]
        if other and not mixed:
            raise DataError(
                f"{result.run} was not asked on {place[0]} in {place[1]} what {first.run} was: "
                f"{difference(result.question, first.question)}; expected the same question, or "
                "--mixed"
            )
        rows.append(_row_of_run(result, first, other))
    question = results[0].question if results else None
    if published:
        usual = {"images": published.images, "captions": published.captions}
        expected = {key: question.get(key) for key in usual} if question else usual
        rows += [
            _row_of_others(row, expected)
            for row in published_rows()
            if row.benchmark == published.name
        ]
    return Table(benchmark=place[0], language=place[1], question=question, rows=rows)


def _row_of_run(result: Result, first: Result, other: bool) -> Row:
    remarks = []
    if other:
        fingerprint = result.question["fingerprint"]
        said = difference(result.question, first.question)
        remarks.append(f"{_OTHER} another question, {fingerprint}: {said}")
    if result.truncated_share:
        remarks.append(
            f"{100 * result.truncated_share:.3g} % of the captions, in all languages, were cut to "
            f"{result.context_length} tokens"
        )
    return Row(
        name=result.run, recalls=result.recalls, other_question=other, remarks=tuple(remarks)
    )


def _row_of_others(row: PublishedRow, expected: Mapping[str, Any]) -> Row:
    said = difference({"images": row.images, "captions": row.captions}, expected)
    remarks = [f"published: {row.source}; {row.images:,} images, {row.captions:,} captions, "
               f"{row.protocol}"]  # fmt: skip
    remarks += [f"{_OTHER} another question: {said}"] if said else []
    remarks += [row.note] if row.note else []
    return Row(
        name=row.model,
        recalls=row.recalls,
        published=True,
        other_question=bool(said),
        remarks=tuple(remarks),
    )


def as_record(tables: Iterable[Table]) -> dict[str, Any]:
    """Return tables as plain dictionaries, for JSON, with recalls in [0, 1] as runs have them."""
    return {
        "tables": [
            {
                "benchmark": table.benchmark,
                "language": table.language,
                "question": table.question,
                "rows": [_row_record(row) for row in table.rows],
            }
            for table in tables
        ]
    }


def _row_record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    recalls = [*zip(SCORES, record.pop("recalls"), strict=True), ("mean_recall", row.mean_recall)]
    scores = {name: None if value is None else round(value / 100, 6) for name, value in recalls}
    return {"name": record.pop("name"), "scores": scores, **record}


def format_tables(tables: Iterable[Table]) -> str:
    """Return the tables in Markdown, in per cent, each with its question and its footnotes."""
    return "\n\n".join(_format(table) for table in tables)


def _format(table: Table) -> str:
    footnotes = list(dict.fromkeys(remark for row in table.rows for remark in row.remarks))
    number = {remark: str(place) for place, remark in enumerate(footnotes, start=1)}
    header = ["model", *(_SHORT[name] for name in SCORES), "MR"]
    lines = []
    for row in table.rows:
        marks = [", published"] * row.published + [f" {_OTHER}"] * row.other_question
        marks += [f" [{', '.join(number[remark] for remark in row.remarks)}]"] * bool(row.remarks)
        values = (*row.recalls, row.mean_recall)
        cells = ["-" if value is None else _one_decimal(value) for value in values]
        lines.append([row.name + "".join(marks), *cells])
    below = [f"{_OTHER}: these rows do not compare with the others."] * any(
        row.other_question for row in table.rows
    )
    which = "the question" if table.question else "the usual question"
    below += [f"Published rows are compared with {which} by numbers of images and captions only."
              ] * any(row.published for row in table.rows)  # fmt: skip
    below += [f"[{number[remark]}] {remark}" for remark in footnotes]
    text = f"### {table.benchmark}, {table.language}\n\n{_question_of(table)}"
    text += f"\n\n{markdown_table(header, lines)}"
    return text + ("\n\n" + "  \n".join(below) if below else "")


def _one_decimal(value: float) -> str:
    """Round as printed tables do: halves upwards, however near below them binary numbers lie."""
    return f"{math.floor(10 * value + 0.5 + 1e-6) / 10:.1f}"


def _question_of(table: Table) -> str:
    question = table.question
    if question is None:
        return "No run has this benchmark in this language. Recalls in per cent."
    parts = [words.format(in_words(question.get(key))) for key, words in WORDS.items()]
    return f"Question {question['fingerprint']}: {', '.join(parts)}. Recalls in per cent."
