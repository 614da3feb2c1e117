"""Retrieval scores that others published, read from the table `published.yaml` beside this file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

RECALLS = 6
"""Text to image at 1, 5 and 10, then image to text at 1, 5 and 10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedBenchmark:
    """A benchmark as it is usually asked."""

    name: str
    language: str
    images: int
    captions: int
    protocol: str
    """In words: which split, which captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """What a model scored without being trained on the benchmark, in somebody's table."""

    model: str
    """As the source calls it."""
    benchmark: str
    language: str
    recalls: tuple[float | None, ...]
    """Six recalls in per cent, see `RECALLS`; None where the source does not print one."""
    printed_mean_recall: float | None
    """The mean of the recalls that are there, as the source prints it."""
    source: str
    """Whose table it is."""
    images: int
    captions: int
    protocol: str
    note: str
    """What else a reader must know; empty where there is nothing."""


@cache
def published_benchmarks() -> Mapping[str, PublishedBenchmark]:
    """Return the benchmarks of which rows are recorded, by name."""
    return {
        name: PublishedBenchmark(name=name, **entry)
        for name, entry in _record()["benchmarks"].items()
    }


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Return all rows that ship with the package, in the order of the table."""
    return tuple(
        _row(table | entry, published_benchmarks()[table["benchmark"]])
        for table in _record()["tables"]
        for entry in table["rows"]
    )


def _row(entry: Mapping[str, Any], benchmark: PublishedBenchmark) -> PublishedRow:
    return PublishedRow(
        model=entry["model"],
        benchmark=benchmark.name,
        language=benchmark.language,
        recalls=_six(entry["recalls"]),
        printed_mean_recall=entry.get("mean_recall"),
        source=entry["source"],
        images=entry.get("images", benchmark.images),
        captions=entry.get("captions", benchmark.captions),
        protocol=entry.get("protocol", benchmark.protocol),
        note=entry.get("note", ""),
    )


def _six(recalls: Sequence[float | None]) -> tuple[float | None, ...]:
    return (*recalls, *[None] * (RECALLS - len(recalls)))


def _record() -> Any:
    text = resources.files("vlm.reports").joinpath("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
