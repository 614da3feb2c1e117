"""Train a small bilingual model on the emoji images, score it on held-out ones, and report."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from vlm.cli.parsing import part_of
from vlm.errors import ConfigError
from vlm.training.config import TrainConfig

DEFAULT_CONFIG = Path("configs/train/emoji.yaml")


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig):
    """What `vlm quickstart` is given: the settings of `vlm train`, and a folder of its own."""

    config: Path | None = None
    """YAML file to use instead of configs/train/emoji.yaml."""
    out: Path = Path("runs/quickstart")
    """Run folder; an existing one is replaced."""


def run(options: Options) -> None:
    """Run the quickstart; print its report's scores and three commands to try next."""
    if options.config is None:
        raise ConfigError(f"there is no {DEFAULT_CONFIG} here; run this in a clone of the project")
    from vlm.quickstart import next_commands, run_quickstart
    from vlm.reports.retrieval_report import format_run

    config = replace(part_of(options, TrainConfig), run_folder=options.out)
    report, scored = run_quickstart(config)
    print(format_run(scored))
    print(f"\nThe report with plots and images: {report}\n\nTry next:", file=sys.stderr)
    print(
        "\n".join(f"  {command}" for command in next_commands(config.run_folder)), file=sys.stderr
    )
