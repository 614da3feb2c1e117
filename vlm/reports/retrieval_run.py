"""A run of `vlm eval retrieval`: what was scored, as the record that is kept of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlm import __version__
from vlm.evaluation.indexes.comparison import (
    IndexPlan,
    IndexReport,
    compare_indexes,
)
from vlm.evaluation.retrieval.evaluation import Evaluation
from vlm.evaluation.retrieval.sources import OpenedSource


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBenchmark:
    """A benchmark and what a model made of it."""

    source: OpenedSource
    evaluation: Evaluation
    indexes: IndexReport | None = None
    """Approximate search with the same vectors, where it was asked for."""

    def with_indexes(self, plan: IndexPlan, *, device: str | None = None) -> "ScoredBenchmark":
        """Return the same with the indexes of a plan put beside exact search.

        Args:
            plan: What to compare.
            device: As for `compare_indexes`.

        Raises:
            SearchIndexError: as `compare_indexes`.
        """
        vectors = self.evaluation.vectors
        texts = {
            language: (vectors.texts[language], of_language.matches)
            for language, of_language in self.source.pairs.texts.items()
        }
        return replace(
            self,
            indexes=compare_indexes(
                vectors.images, texts, plan, ranks=self.evaluation.ranks, device=device
            ),
        )

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        record = self.evaluation.as_record()
        record |= {"kind": self.source.kind, "split": self.source.split}
        record["source"] = self.source.source.as_record()
        if self.source.findings:
            record["findings"] = dict(self.source.findings)
        if self.indexes:
            record["indexes"] = self.indexes.as_record()
        return record


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalRun:
    """A bundle's scores on several benchmarks."""

    bundle: str
    """The bundle's folder."""
    benchmarks: Mapping[str, ScoredBenchmark]

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        return {
            "bundle": self.bundle,
            "vlm": __version__,
            "benchmarks": {name: scored.as_record() for name, scored in self.benchmarks.items()},
        }
