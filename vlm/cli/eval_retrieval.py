"""Score a bundle on retrieval in both directions and every language, and report what was found.

Also under `accelerate launch -m vlm eval retrieval`, which splits the work over processes.
"""

import sys
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
from vlm.evaluation.indexes import check_factories
from vlm.evaluation.retrieval.run import evaluate
from vlm.reports.results import RECORD_NAME
from vlm.reports.retrieval_report import format_run, retrieval_document


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
            check_factories(plan, embedder.embedder.embed_dim)
        found = evaluate(embedder, asked, bundle=options.bundle)
    if group.rank > 0:  # the first process alone compares indexes and reports
        return
    if plan:
        found = found.with_indexes(plan, device=options.device)
    for name, scored in found.benchmarks.items():
        for warning in scored.indexes.warnings if scored.indexes else ():
            print(f"warning: {name}: {warning}", file=sys.stderr)
    deliver(
        options,
        found.as_record(),
        record_name=RECORD_NAME,
        document=lambda: retrieval_document(found),
        table=lambda: format_run(found),
    )
    if found.index_error:
        raise found.index_error
