"""Train a model as a configuration file and options say, and leave a bundle.

A YAML file states what differs from the defaults. Relative paths in it start from the current
folder, as those on the command line do.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.cli.parsing import part_of
from vlm.errors import ConfigError
from vlm.training.config import ClusterConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig, ClusterConfig):
    """What `vlm train` is given."""

    config: Path | None = None
    """YAML file, such as configs/train/emoji.yaml."""
    resume: str = field(default="never", metadata={"alone": "auto"})
    """Whether to go on with a run: `auto`, which `--resume` alone is, from the newest checkpoint in
    run_folder that is whole, and from the start if there is none; or the folder of a checkpoint;
    or `never`."""
    dry_run: bool = False
    """Train nothing: read some samples of each source, and print what the run would take of `world`
    devices, and what would stop it."""
    json: bool = False
    """For a dry run: print JSON."""


def run(options: Options) -> None:
    """Train, and print the bundle's folder; or print what that would take."""
    config = part_of(options, TrainConfig)
    if options.dry_run:
        _print_plan(options, config)
        return
    from vlm.training.build import build_run

    print(build_run(config, resume=_resume(options)).fit())


def _resume(options: Options) -> Any:
    return options.resume if options.resume in ("auto", "never") else Path(options.resume)


def _print_plan(options: Options, config: TrainConfig) -> None:
    if os.environ.get("RANK", "0") != "0":  # one process plans for all
        return
    from vlm.training.dry_run import as_text, dry_run

    plan = dry_run(config, part_of(options, ClusterConfig), resume=_resume(options))
    print(json.dumps(plan.record(), indent=1) if options.json else as_text(plan))
    if plan.problems:
        number = len(plan.problems)
        raise ConfigError(f"the run would not get through: {number} problem{'s' * (number > 1)}")
