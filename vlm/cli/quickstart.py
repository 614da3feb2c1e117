"""Train a small bilingual model on the emoji images, score it on what was held out, report."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.errors import ConfigError
from vlm.quickstart import next_commands, run_quickstart
from vlm.reports.retrieval_report import format_run
from vlm.training.config import TrainConfig

_CONFIG = Path("configs/train/emoji.yaml")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm quickstart`: those of `vlm train` and its own folder."""
    parser.default_config_files = [str(_CONFIG)]
    parser.add_argument("--config", action="config", help=f"YAML file instead of {_CONFIG}")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="run folder, replaced if there"
    )
    parser.add_class_arguments(TrainConfig, as_group=False)


def run(options: Any) -> None:
    """Run the quickstart; print its report's scores and three commands to try next."""
    if not (options.config or _CONFIG.is_file()):
        raise ConfigError(f"there is no {_CONFIG} here; run this in a clone of the project")
    fields = {name: getattr(options, name) for name in TrainConfig.__dataclass_fields__}
    config = replace(TrainConfig(**fields), run_folder=options.out)
    report, scored = run_quickstart(config)
    print(format_run(scored))
    print(f"\nThe report with plots and images: {report}\n\nTry next:", file=sys.stderr)
    print(
        "\n".join(f"  {command}" for command in next_commands(config.run_folder)), file=sys.stderr
    )
