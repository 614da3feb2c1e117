"""Score a bundle on retrieval in both directions and every language, and report what was found.

Also under `accelerate launch -m vlm eval retrieval`, which splits the work over processes.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.bulk_embedding import BulkEmbedder
from vlm.cli.evaluation_sources import SourcesFile, add_source_arguments, sources
from vlm.cli.index_options import add_index_arguments, index_plan
from vlm.distributed.launched import launched_group
from vlm.embedder import Embedder
from vlm.files import write_file
from vlm.reports.document import write_report
from vlm.reports.results import RECORD_NAME
from vlm.reports.retrieval_report import retrieval_document
from vlm.reports.retrieval_run import RetrievalRun, ScoredBenchmark, format_run
from vlm.retrieval.evaluation import evaluate_with_protocol
from vlm.retrieval.sources import open_source


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm eval retrieval`."""
    parser.add_argument(
        "--config", action=SourcesFile,
        help="YAML file with these options, such as configs/evaluate/five_benchmarks.yaml",
    )  # fmt: skip
    parser.add_argument("bundle", type=Path, help="folder of the bundle to score")
    add_source_arguments(parser, many=True)
    add_index_arguments(parser)
    parser.add_argument("--device", type=str | None, default=None, help="such as cpu or cuda:0")
    parser.add_argument(
        "--truncate_dim", type=int | None, default=None,
        help="use the first so many numbers of each vector, where they were trained so",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out", type=Path | None, default=None,
        help="folder for report.html, report.md and retrieval.json",
    )  # fmt: skip
    parser.add_argument(
        "--cache", type=Path | None, default=None,
        help="folder that keeps embeddings, so that an interrupted run goes on where it was; "
        "default: embeddings in the folder of --out",
    )  # fmt: skip


def run(options: Any) -> None:
    """Score the bundle; print a table or JSON, and write the report."""
    asked, plan = sources(options), index_plan(options)
    with launched_group(options.device) as group:
        embedder = BulkEmbedder(
            Embedder.load(options.bundle, device=options.device, truncate_dim=options.truncate_dim),
            cache=options.cache or (options.out / "embeddings" if options.out else None),
            group=group,
            show_progress_bar=True,
        )
        # All are opened before any is scored, so that a mistake in the last costs no work.
        opened = [open_source(each, languages=embedder.embedder.languages) for each in asked]
        scored = {}
        for source in opened:
            if source.findings and group.rank == 0:
                print(f"{source.name}: {dict(source.findings)}", file=sys.stderr)
            evaluation = evaluate_with_protocol(embedder, source.pairs)
            scored[source.name] = ScoredBenchmark(source=source, evaluation=evaluation)
    if group.rank == 0:  # the others need not wait for what one process does
        if plan:
            scored = {
                name: each.with_indexes(plan, device=options.device)
                for name, each in scored.items()
            }
        _report(options, RetrievalRun(bundle=str(options.bundle), benchmarks=scored))


def _report(options: Any, scored: RetrievalRun) -> None:
    text = json.dumps(scored.as_record(), indent=1, ensure_ascii=False)
    if options.out:
        write_file(options.out / RECORD_NAME, (text + "\n").encode())
        page = write_report(options.out, retrieval_document(scored))
        print(f"report: {page}", file=sys.stderr)
    for name, each in scored.benchmarks.items():
        for warning in each.indexes.warnings if each.indexes else ():
            print(f"warning: {name}: {warning}", file=sys.stderr)
    print(text if options.json else format_run(scored))
