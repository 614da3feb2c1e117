"""Train a model as a configuration file and options say, and leave a bundle.

A YAML file states what differs from the defaults. Relative paths in it start from the current
folder, as those on the command line do.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.cli.parsing import part_of
from vlm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Options(TrainConfig):
    """What `vlm train` is given."""

    config: Path | None = None
    """YAML file, such as configs/train/emoji.yaml."""
    resume: str = field(default="never", metadata={"alone": "auto"})
    """Whether to go on with a run: `auto`, which `--resume` alone is, from the newest checkpoint in
    run_folder that is whole, and from the start if there is none; or the folder of a checkpoint;
    or `never`."""


def run(options: Options) -> None:
    """Train; print the bundle's folder."""
    from vlm.training.build import build_run

    resume: Any = options.resume if options.resume in ("auto", "never") else Path(options.resume)
    print(build_run(part_of(options, TrainConfig), resume=resume).fit())
