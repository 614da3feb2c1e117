"""Train a model as a configuration file and options say, and leave a bundle.

A YAML file states what differs from the defaults. Relative paths in it start from the current
folder, as those on the command line do.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from vlm.cli.parsing import part_of
from vlm.errors import ConfigError, InterruptedRunError
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
    with _ended_by_signals():
        from vlm.training.build import build_run

        training = build_run(config, resume=_resume(options))
        bundle = training.fit()
        if training.accelerator.is_main_process:
            print(bundle)


def _resume(options: Options) -> Any:
    return options.resume if options.resume in ("auto", "never") else Path(options.resume)


def _print_plan(options: Options, config: TrainConfig) -> None:
    if os.environ.get("RANK", "0") != "0":  # one process plans for all
        return
    from vlm.training.planning.dry_run import as_text, dry_run

    plan = dry_run(config, part_of(options, ClusterConfig), resume=_resume(options))
    print(json.dumps(plan.record(), indent=1) if options.json else as_text(plan))
    if plan.problems:
        number = len(plan.problems)
        raise ConfigError(f"the run would not get through: {number} problem{'s' * (number > 1)}")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let the signals that ask a run to end do so at once where there is nothing to save.

    While it trains it listens to them itself.
    """

    def end(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        raise InterruptedRunError(f"interrupted by {name} outside training, with nothing to save")

    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
