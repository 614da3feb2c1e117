"""Score a bundle on retrieval in both directions and every language, and report what was found.

Also under `accelerate launch -m vlm eval retrieval`, which splits the work over processes. A file
such as configs/evaluate/five_benchmarks.yaml has these options; the bundle stays on the command
line.
"""

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from vlm.cli.options import EvaluationOptions, IndexOptions, sources_in
from vlm.evaluation.config import RetrievalSettings, RetrievalSource


@dataclass(frozen=True)
class Options(RetrievalSettings, IndexOptions, EvaluationOptions):
    """What `vlm eval retrieval` is given."""

    bundle: Path
    """Folder of the bundle to score."""
    _: KW_ONLY
    config: Path | None = None
    """YAML file with these options."""
    data: tuple[str | RetrievalSource, ...] = ("data/emoji",)
    """[NAME=]PATH of data folders, of the files of published benchmarks, or of other sources, here
    or at a URL; the name is that of the scores. In a file, also mappings with path and settings of
    their own."""


def run(options: Options) -> None:
    """Score the bundle; print a table or JSON, and write the report."""
    options.check_folders()
    plan = options.index_plan()
    asked = sources_in(options, options.data)
    from vlm.distributed.groups import launched_group
    from vlm.evaluation.indexes import check_factories
    from vlm.evaluation.retrieval.run import evaluate
    from vlm.reports.results import RECORD_NAME
    from vlm.reports.retrieval_report import format_run, retrieval_document

    with launched_group(options.device) as group:
        embedder = options.bulk_embedder(options.bundle, group)
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
    options.deliver(
        found.as_record(),
        record_name=RECORD_NAME,
        document=lambda: retrieval_document(found),
        table=lambda: format_run(found),
    )
    if found.index_error:
        raise found.index_error
