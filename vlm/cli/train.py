"""Train a model as a configuration file and options say, and leave a bundle.

A YAML file states what differs from the defaults. Relative paths in it start from the current
folder, as those on the command line do.
"""

from dataclasses import dataclass
from pathlib import Path

from vlm.cli.parsing import part_of
from vlm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig):
    """What `vlm train` is given."""

    config: Path | None = None
    """YAML file, such as configs/train/emoji.yaml."""
    resume: bool = False
    """Continue from the newest checkpoint in run_folder."""


def run(options: Options) -> None:
    """Train; print the bundle's folder."""
    from vlm.training.build import build_run

    print(build_run(part_of(options, TrainConfig), resume=options.resume).fit())
