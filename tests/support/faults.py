"""Faults on purpose: in the place of a run's step, and in runs of the command."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

from tests.support.commands import environments, run_main
from tests.support.processes import PROCESSES
from vlm.batches.batch import Batch
from vlm.training.config import TrainConfig, config_as_yaml
from vlm.training.run import Run
from vlm.training.step import StepOutput

Fault = Callable[[Run, Sequence[Batch]], StepOutput]
"""Takes a step with a fault in it."""


def with_fault(run: Run, fault: Fault, at: Collection[int], rank: int | None = None) -> Run:
    """Return a run whose steps of these numbers, counted from 1 in this process, have a fault.

    Args:
        run: The run as it was built.
        fault: What goes wrong.
        at: The steps.
        rank: The rank that it happens on; None for all.
    """
    taken = run.progress.step

    def step(parts: Sequence[Batch]) -> StepOutput:
        nonlocal taken
        taken += 1
        here = rank is None or run.accelerator.process_index == rank
        return fault(run, parts) if here and taken in at else run.step(parts)

    return replace(run, step=step)


def bad_images(value: float) -> Fault:
    """Give the model images of this value: of NaN, or of a size that no image has."""

    def fault(run: Run, parts: Sequence[Batch]) -> StepOutput:
        return run.step(
            [replace(part, images=torch.full_like(part.images, value)) for part in parts]
        )

    return fault


def bad_gradient(value: float, number: int = 0) -> Fault:
    """Spoil one number in the gradient of one parameter, after the backward pass."""

    def fault(run: Run, parts: Sequence[Batch]) -> StepOutput:
        output = run.step(parts)
        trained = [p for p in run.model.parameters() if p.grad is not None]
        gradient: Any = trained[number % len(trained)].grad
        gradient[(-1,) * gradient.ndim] = value
        return output

    return fault


def bad_loss(value: float = math.nan) -> Fault:
    """Report another loss than the one whose gradient was taken."""

    def fault(run: Run, parts: Sequence[Batch]) -> StepOutput:
        output = run.step(parts)
        return output._replace(loss=torch.full_like(output.loss, value))

    return fault


def called(function: Callable[[], None]) -> Fault:
    """Call a function before the step, which is then taken: one that kills, stalls or signals."""

    def fault(run: Run, parts: Sequence[Batch]) -> StepOutput:
        function()
        return run.step(parts)

    return fault


def start_training(
    config: TrainConfig,
    fault: Callable[[Run], Run],
    err: Path,
    *arguments: str,
    processes: int = 1,
) -> list[ForkServerProcess]:
    """Start `vlm train` with a fault in its run, on ranks that write all that they say to `err`.

    `fault` is at module level.
    """
    path = err.with_suffix(".yaml")
    path.write_text(config_as_yaml(config), encoding="utf-8")
    words = ["train", "--config", str(path), *arguments]
    ranks = [
        PROCESSES.Process(target=run_main, args=(words, err.parent, environment, err, err, fault))
        for environment in environments(processes)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def ended(ranks: Sequence[ForkServerProcess], seconds: float = 60.0) -> list[int | None]:
    """Wait for ranks to end; return their exit codes, None for one that hangs."""
    deadline = monotonic() + seconds
    for rank in ranks:
        rank.join(max(deadline - monotonic(), 0))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is true."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it has not come true"
        sleep(0.02)
