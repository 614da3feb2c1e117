"""Score a bundle on zero-shot classification, with class names and prompts in every language.

Also under `accelerate launch -m vlm eval classification`, which splits the work over processes.
"""

from dataclasses import dataclass
from pathlib import Path

from vlm.cli.options import EvaluationOptions
from vlm.cli.parsing import part_of
from vlm.evaluation.config import ClassificationSource


@dataclass(frozen=True)
class Options(ClassificationSource, EvaluationOptions):
    """What `vlm eval classification` is given."""

    bundle: Path
    """Folder of the bundle to score."""


def run(options: Options) -> None:
    """Score the bundle; print a table or JSON, and write the report, on the first rank."""
    options.check_folders()
    from vlm.distributed.groups import launched_group
    from vlm.evaluation.classification.run import evaluate
    from vlm.reports.classification_report import classification_document, format_classification

    source = part_of(options, ClassificationSource)
    with launched_group(options.device) as group:
        found = evaluate(
            options.bulk_embedder(options.bundle, group), source, bundle=str(options.bundle)
        )
    if group.rank == 0:
        options.deliver(
            found.as_record(),
            record_name="classification.json",
            document=lambda: classification_document(found),
            table=lambda: format_classification(found),
        )
