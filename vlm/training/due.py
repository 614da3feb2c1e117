"""What is to be done after a step."""

from typing import NamedTuple

from vlm.training.config import TrainConfig


class Due(NamedTuple):
    """What is to be done after a step: each every n steps and at the end; 0 is never."""

    report: bool
    save: bool
    evaluate: bool
    last: bool

    @property
    def any(self) -> bool:
        """Whether the host has to know how the step went."""
        return any(self)


def due_after(step: int, config: TrainConfig) -> Due:
    """Return what is due once `step` steps are taken."""
    last = step == config.schedule.steps
    report, save, evaluate = (
        every > 0 and (step % every == 0 or last)
        for every in (
            config.report_every, config.checkpoint.every_steps, config.evaluation.every_steps,
        )
    )  # fmt: skip
    return Due(report, save, evaluate, last)
