"""Results of several evaluations next to published ones: a table by benchmark and language.

Scores that others published are in `published.yaml` next to this file.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from vlm.errors import ConfigError, DataError
from vlm.evaluation.retrieval.metrics import mean_recall
from vlm.markdown import markdown_table
from vlm.reports.results import SCORES, WORDS, Result, difference, in_words

_OTHER = "≠"
_HEADER = [
    "model",
    *(name.replace("text_to_image/recall", "T to I R").replace("image_to_text/recall", "I to T R")
      for name in SCORES),
    "MR",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """The zero-shot scores of a model in a published table."""

    model: str
    """As the source calls it."""
    benchmark: str
    language: str
    recalls: tuple[float | None, ...]
    """In per cent, in the order of `SCORES`; None if the source does not print one."""
    mean_recall: float | None = None
    """The mean of the recalls that are there, as the source prints it."""
    source: str
    """Whose table it is."""
    images: int
    captions: int
    protocol: str
    note: str = ""
    """What else a reader must know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of a table."""

    name: str
    recalls: tuple[float | None, ...]
    """In per cent, in the order of `SCORES`; None where it is not known."""
    published: bool = False
    comparable: bool = True
    """Whether it has the protocol of the table's first row."""
    remarks: tuple[str, ...] = ()

    @property
    def mean_recall(self) -> float | None:
        """MR: the mean of all six recalls, in per cent; None where one of them is not known."""
        known = [recall for recall in self.recalls if recall is not None]
        return mean_recall(known) if len(known) == len(SCORES) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows with one protocol, except for those that are not `comparable`."""

    benchmark: str
    language: str
    question: Mapping[str, Any] | None
    """The protocol of the first run; None where no run has the benchmark in this language."""
    rows: Sequence[Row]


@cache
def published_benchmarks() -> Mapping[str, Mapping[str, Any]]:
    """Return by name the usual protocol of benchmarks: language, images, captions, protocol."""
    benchmarks: dict[str, Mapping[str, Any]] = _record()["benchmarks"]
    return benchmarks


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Return all rows that ship with the package, in the order of the file."""
    rows = []
    for table in _record()["tables"]:
        common = {**published_benchmarks()[table["benchmark"]], **table}
        del common["rows"]
        for entry in table["rows"]:
            recalls = entry["recalls"] + [None] * (len(SCORES) - len(entry["recalls"]))
            rows.append(PublishedRow(**common | entry | {"recalls": tuple(recalls)}))
    return tuple(rows)


def _record() -> Any:
    text = resources.files("vlm.reports").joinpath("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def tables_of(
    results: Sequence[Result], *, published: Sequence[str] = (), mixed: bool = False
) -> list[Table]:
    """Put results into a table for each benchmark and language, in their order.

    Args:
        results: What the runs scored.
        published: Benchmarks whose published rows to add: to the runs' benchmark of the same name,
            whatever its case and hyphens, or to NAME in `NAME=BENCHMARK`; in a table of their own
            if no run has the benchmark.
        mixed: Whether a table may hold runs with another protocol than its first run.

    Raises:
        ConfigError: there is nothing to tabulate, or no such published benchmark, or no such NAME.
        DataError: runs have different protocols, and `mixed` is false.
    """
    of_runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        of_runs.setdefault((result.benchmark, result.language), []).append(result)
    of_others = _published_by_place(published, results)
    if not of_runs and not of_others:
        raise ConfigError("there is nothing to tabulate; expected folders of runs, or --published")
    return [
        _table(place, of_runs.get(place, []), of_others.get(place), mixed)
        for place in dict.fromkeys([*of_runs, *of_others])
    ]


def _published_by_place(
    asked: Sequence[str], results: Sequence[Result]
) -> dict[tuple[str, str], str]:
    """Return the names of the published benchmarks by the name and language of their table."""
    names = list(dict.fromkeys(result.benchmark for result in results))
    found: dict[tuple[str, str], str] = {}
    for text in asked:
        name, sign, wanted = text.rpartition("=")
        if wanted not in published_benchmarks():
            raise ConfigError(
                f"there are no published rows of {wanted!r}; expected one of "
                f"{', '.join(published_benchmarks())}"
            )
        if sign and name not in names:
            raise ConfigError(f"no run has a benchmark {name!r}; expected one of {names}")
        same = [name] if sign else [each for each in names if _plain(each) == _plain(wanted)]
        for each in same or [wanted]:
            first = found.setdefault((each, published_benchmarks()[wanted]["language"]), wanted)
            if first != wanted:
                raise ConfigError(
                    f"{each} is given the published rows of {first} and of {wanted}; expected one "
                    "of them"
                )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _table(
    place: tuple[str, str], results: Sequence[Result], published: str | None, mixed: bool
) -> Table:
    rows = []
    for result in results:
        row = _row_of_run(result, results[0])
        if not row.comparable and not mixed:
            raise DataError(
                f"{result.run} and {results[0].run} have different protocols on {place[0]} in "
                f"{place[1]}: {difference(result.question, results[0].question)}; expected the "
                "same protocol, or --mixed"
            )
        rows.append(row)
    question = results[0].question if results else None
    if published:
        usual = question or published_benchmarks()[published]
        expected = {key: usual.get(key) for key in ("images", "captions")}
        rows += [
            _row_of_others(row, expected) for row in published_rows() if row.benchmark == published
        ]
    return Table(benchmark=place[0], language=place[1], question=question, rows=rows)


def _row_of_run(result: Result, first: Result) -> Row:
    remarks = []
    fingerprint = result.question["fingerprint"]
    comparable = fingerprint == first.question["fingerprint"]
    if not comparable:
        differs = difference(result.question, first.question)
        remarks.append(f"{_OTHER} protocol {fingerprint}: {differs}")
    if result.truncated_share:
        remarks.append(
            f"{100 * result.truncated_share:.3g} % of the captions in all languages truncated to "
            f"{result.context_length} tokens"
        )
    return Row(
        name=result.run, recalls=result.recalls, comparable=comparable, remarks=tuple(remarks)
    )


def _row_of_others(row: PublishedRow, expected: Mapping[str, Any]) -> Row:
    differs = difference({"images": row.images, "captions": row.captions}, expected)
    remarks = [f"published: {row.source}; {row.images:,} images, {row.captions:,} captions, "
               f"{row.protocol}"]  # fmt: skip
    if differs:
        remarks.append(f"{_OTHER} protocol: {differs}")
    if row.note:
        remarks.append(row.note)
    comparable = not differs
    return Row(
        name=row.model, recalls=row.recalls, published=True, comparable=comparable,
        remarks=tuple(remarks),
    )  # fmt: skip


def as_record(tables: Iterable[Table]) -> dict[str, Any]:
    """Return tables as plain dictionaries, for JSON, with recalls in [0, 1] as runs have them."""
    return {
        "tables": [asdict(table) | {"rows": [*map(_row_record, table.rows)]} for table in tables]
    }


def _row_record(row: Row) -> dict[str, Any]:
    record = asdict(row)
    recalls = [*zip(SCORES, record.pop("recalls"), strict=True), ("mean_recall", row.mean_recall)]
    scores = {name: None if value is None else round(value / 100, 6) for name, value in recalls}
    return {"name": record.pop("name"), "scores": scores, **record}


def format_tables(tables: Iterable[Table]) -> str:
    """Return the tables in Markdown, in per cent, each with its protocol and its footnotes."""
    return "\n\n".join(_format(table) for table in tables)


def _format(table: Table) -> str:
    remarks = dict.fromkeys(remark for row in table.rows for remark in row.remarks)
    numbers = {remark: str(number) for number, remark in enumerate(remarks, start=1)}
    rows = [
        [_label(row, numbers), *map(_cell, (*row.recalls, row.mean_recall))] for row in table.rows
    ]
    notes = []
    if not all(row.comparable for row in table.rows):
        notes.append(f"{_OTHER}: not comparable with the other rows.")
    if any(row.published for row in table.rows):
        notes.append("The protocol of published rows is compared by image and caption counts only.")
    notes += [f"[{number}] {remark}" for remark, number in numbers.items()]
    protocol = "No run has this benchmark in this language"
    if table.question is not None:
        parts = [words.format(in_words(table.question.get(key))) for key, words in WORDS.items()]
        protocol = f"Protocol {table.question['fingerprint']}: {', '.join(parts)}"
    blocks = [
        f"### {table.benchmark}, {table.language}",
        f"{protocol}. Recalls in per cent.",
        markdown_table(_HEADER, rows),
        "  \n".join(notes),  # two spaces at its end break a line in Markdown
    ]
    return "\n\n".join(filter(None, blocks))


def _label(row: Row, numbers: Mapping[str, str]) -> str:
    """Return a row's name with its marks, such as `M2-Encoder, published ≠ [2, 3]`."""
    label = row.name
    if row.published:
        label += ", published"
    if not row.comparable:
        label += f" {_OTHER}"
    if row.remarks:
        label += f" [{', '.join(numbers[remark] for remark in row.remarks)}]"
    return label


def _cell(value: float | None) -> str:
    """Round as printed tables do: halves upwards, also those that binary numbers put just below."""
    return "-" if value is None else f"{math.floor(10 * value + 0.5 + 1e-6) / 10:.1f}"
