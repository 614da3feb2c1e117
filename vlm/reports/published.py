"""Retrieval scores that others published, read from `published.yaml` next to this file."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

RECALLS = 6
"""Text to image at 1, 5 and 10, then image to text at 1, 5 and 10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """The zero-shot scores of a model in a published table."""

    model: str
    """As the source calls it."""
    benchmark: str
    language: str
    recalls: tuple[float | None, ...]
    """Six recalls in per cent, see `RECALLS`; None if the source does not print one."""
    mean_recall: float | None = None
    """The mean of the recalls that are there, as the source prints it."""
    source: str
    """Whose table it is."""
    images: int
    captions: int
    protocol: str
    note: str = ""
    """What else a reader must know."""


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
            recalls = entry["recalls"] + [None] * (RECALLS - len(entry["recalls"]))
            rows.append(PublishedRow(**common | entry | {"recalls": tuple(recalls)}))
    return tuple(rows)


def _record() -> Any:
    text = resources.files("vlm.reports").joinpath("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
