"""Score a model on several retrieval benchmarks: `evaluate`, and the record of what it found."""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm.data.source import Source, open_source as open_data
from vlm.embedding.bulk import BulkEmbedder
from vlm.embedding.embedder import Embedder
from vlm.errors import SearchIndexError
from vlm.evaluation.config import IndexPlan, RetrievalSource
from vlm.evaluation.indexes import IndexReport, compare_indexes
from vlm.evaluation.retrieval.baselines import chance_scores, pixel_ranks
from vlm.evaluation.retrieval.evaluation import Evaluation, evaluate_pairs
from vlm.evaluation.retrieval.everyday import EverydayAnswers, EverydayQuestion, ask, read_questions
from vlm.evaluation.retrieval.metrics import CUTOFFS, scores_of
from vlm.evaluation.retrieval.pairs import RetrievalPairs
from vlm.evaluation.retrieval.sources import open_source, sources_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBenchmark:
    """A benchmark, and a model's evaluation on it."""

    source: RetrievalSource
    pairs: RetrievalPairs
    evaluation: Evaluation
    indexes: IndexReport | None = None
    """Approximate search with the same vectors, if it was asked for."""
    baselines: Mapping[str, Mapping[str, float]]
    """What images and texts in random order score in the mean (`chance`), and what raw pixels do
    (`pixels`) if that was asked for, under the keys of `evaluate_retrieval`."""
    everyday: EverydayAnswers | None = None
    """What everyday questions find among the same images, if some were asked."""

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        record = self.evaluation.as_record()
        record |= {"kind": self.pairs.kind, "split": self.pairs.split}
        record["source"] = self.source.as_record()
        record["baselines"] = {name: dict(each) for name, each in self.baselines.items()}
        if self.pairs.findings:
            record["findings"] = dict(self.pairs.findings)
        if self.indexes:
            record["indexes"] = self.indexes.as_record()
        if self.everyday:
            record["everyday"] = self.everyday.as_record()
        return record


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalRun:
    """A model's scores on several benchmarks."""

    bundle: str
    """The bundle's folder."""
    benchmarks: Mapping[str, ScoredBenchmark]
    index_error: SearchIndexError | None = None
    """Why indexes are missing, so that scores are not lost for an index that cannot be built."""

    def with_indexes(
        self, plan: IndexPlan, *, names: Collection[str] | None = None, device: str | None = None
    ) -> "RetrievalRun":
        """Return the same run with indexes compared with exact search, up to the first error.

        It is done for the benchmarks `names`, or all; `device` is as for `compare_indexes`.
        """
        benchmarks, error = dict(self.benchmarks), None
        try:
            for name, scored in self.benchmarks.items():
                if names is None or name in names:
                    found = scored.evaluation
                    texts = {
                        language: (found.text_features[language], own.matches)
                        for language, own in scored.pairs.texts.items()
                    }
                    indexes = compare_indexes(
                        found.image_features, texts, plan, ranks=found.ranks, device=device
                    )
                    benchmarks[name] = replace(scored, indexes=indexes)
        except SearchIndexError as raised:
            error = raised
        return replace(self, benchmarks=benchmarks, index_error=error)

    @property
    def everyday(self) -> dict[str, EverydayAnswers]:
        """What everyday questions found, by benchmark."""
        return {name: each.everyday for name, each in self.benchmarks.items() if each.everyday}

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        return {
            "bundle": self.bundle,
            "vlm": version("vlm"),
            "benchmarks": {name: scored.as_record() for name, scored in self.benchmarks.items()},
        }


def evaluate(
    embedder: Embedder | BulkEmbedder,
    sources: Sequence[str | Path | RetrievalSource],
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    bundle: str | Path = "",
) -> RetrievalRun:
    """Score a model on benchmarks, in both directions and every language.

    Args:
        embedder: The model; a `BulkEmbedder` to share the work over ranks, which must all call
            this, to keep vectors on disk, or to show progress.
        sources: Data folders, files of published benchmarks and other sources, here or at a URL:
            paths, `NAME=PATH`, or sources with settings.
        cutoffs: The k of the recalls, at least 1 each.
        bundle: The model's name in the record.

    Raises:
        VlmError: there are no cutoffs, or one is less than 1.
        ConfigError: two sources have one name, or a setting does not fit the files.
        DataError: a benchmark or an image cannot be read, or there is nothing to ask.
    """
    bulk = BulkEmbedder(embedder) if isinstance(embedder, Embedder) else embedder
    # All are opened before any is scored, so that a mistake in the last costs no work.
    opened = [
        (
            source,
            open_source(source, languages=bulk.embedder.languages),
            _questions_of(source),
            _references_of(source),
        )
        for source in sources_of(sources)
    ]
    scored = {}
    for source, pairs, questions, references in opened:
        if pairs.findings and bulk.show_progress_bar:
            tqdm.write(f"{source.name}: {'; '.join(pairs.describe_findings())}", file=sys.stderr)
        evaluation = evaluate_pairs(bulk, pairs, cutoffs=cutoffs)
        everyday = questions and ask(
            bulk,
            questions,
            concepts=pairs.concepts,
            image_features=evaluation.image_features,
            languages=list(pairs.texts),
        )
        scored[source.name] = ScoredBenchmark(
            source=source,
            pairs=pairs,
            evaluation=evaluation,
            baselines=_baselines(pairs, references, cutoffs),
            everyday=everyday or None,
        )
    return RetrievalRun(bundle=str(bundle), benchmarks=scored)


def _baselines(
    pairs: RetrievalPairs, references: Source | None, cutoffs: Sequence[int]
) -> dict[str, Mapping[str, float]]:
    found: dict[str, Mapping[str, float]] = {"chance": chance_scores(pairs, cutoffs)}
    if references is not None:
        found["pixels"] = scores_of(pixel_ranks(pairs, references), cutoffs)
    return found


def _references_of(source: RetrievalSource) -> Source | None:
    """Open the images that raw pixels are compared with, if that is asked for."""
    if not source.pixels:
        return None
    return open_data(replace(source.config(), split=source.pixels, where=()))


def _questions_of(source: RetrievalSource) -> list[EverydayQuestion]:
    return read_questions(source.questions, part=source.part) if source.questions else []
