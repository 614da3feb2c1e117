"""Score a bundle on retrieval in both directions and every language, and report what was found.

Also under `accelerate launch -m vlm eval retrieval`, which splits the work over processes.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.cli.evaluation_runs import (
    add_embedder_arguments,
    add_output_arguments,
    bulk_embedder,
    deliver,
)
from vlm.cli.evaluation_sources import SourcesFile, add_source_arguments, sources
from vlm.cli.index_options import add_index_arguments, index_plan
from vlm.distributed.launched import launched_group
from vlm.errors import SearchIndexError
from vlm.evaluation.retrieval.evaluation import evaluate_with_protocol
from vlm.evaluation.retrieval.sources import open_source
from vlm.reports.results import RECORD_NAME
from vlm.reports.retrieval_report import format_run, retrieval_document
from vlm.reports.retrieval_run import RetrievalRun, ScoredBenchmark


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval retrieval`."""
    parser.add_argument(
        "--config", action=SourcesFile,
        help="YAML file with these options, such as configs/evaluate/five_benchmarks.yaml; "
        "the bundle stays on the command line",
    )  # fmt: skip
    parser.add_argument("bundle", type=Path, help="folder of the bundle to score")
    add_source_arguments(parser, many=True)
    add_index_arguments(parser)
    add_embedder_arguments(parser)
    add_output_arguments(parser, record_name=RECORD_NAME)


def run(options: Any) -> None:
    """Score the bundle; print a table or JSON, and write the report."""
    asked, plan = sources(options), index_plan(options)
    with launched_group(options.device) as group:
        embedder = bulk_embedder(options, group)
        if plan:
            plan.check(embedder.embedder.embed_dim)
        # All are opened before any is scored, so that a mistake in the last costs no work.
        opened = [open_source(each, languages=embedder.embedder.languages) for each in asked]
        scored = {}
        for source in opened:
            if source.findings and group.rank == 0:
                print(f"{source.name}: {dict(source.findings)}", file=sys.stderr)
            evaluation = evaluate_with_protocol(embedder, source.pairs)
            scored[source.name] = ScoredBenchmark(source=source, evaluation=evaluation)
    if group.rank > 0:  # the others need not wait for what one process does
        return
    failure = None
    if plan:
        try:
            for name, each in scored.items():
                scored[name] = each.with_indexes(plan, device=options.device)
        except SearchIndexError as error:  # scores are not lost for an index that cannot be built
            failure = error
    _warn(scored)
    found = RetrievalRun(bundle=str(options.bundle), benchmarks=scored)
    deliver(
        options,
        found.as_record(),
        record_name=RECORD_NAME,
        document=lambda: retrieval_document(found),
        table=lambda: format_run(found),
    )
    if failure:
        raise failure


def _warn(scored: Mapping[str, ScoredBenchmark]) -> None:
    for name, each in scored.items():
        for warning in each.indexes.warnings if each.indexes else ():
            print(f"warning: {name}: {warning}", file=sys.stderr)
