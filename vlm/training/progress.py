"""How far a run has come, and what is to be done after a step."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from vlm.training.config import TrainConfig


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Samples read by all processes."""
    learning_rate: float = field(default=0.0, compare=False)
    """Learning rate of the last step, printed when a run resumes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the numbers."""
        self.step, self.samples = state["step"], state["samples"]
        self.learning_rate = state["learning_rate"]


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
