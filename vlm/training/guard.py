"""Updates that must not happen: those of a gradient that is not finite."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm.errors import TrainingError
from vlm.training.optimizer import reads_found_inf
from vlm.training.step import StepResult


def step_when_finite(optimizer: torch.optim.Optimizer, gradient_norm: Tensor) -> None:
    """Update the weights, unless this norm or an earlier one is not finite.

    Otherwise weights, moments and step counts stay as they are. The host need not know to go on:
    fused optimizers read `found_inf` in their kernel, which is how gradient scalers skip a step as
    well. Before a step of any other optimizer it waits for the device, and looks.
    """
    plain: Any = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
    wrong = (~gradient_norm.isfinite()).float()
    before = getattr(plain, "found_inf", None)
    plain.found_inf = wrong if before is None else torch.maximum(before, wrong)
    if reads_found_inf(optimizer) or not plain.found_inf.item():
        optimizer.step()


def check_finite(results: Sequence[StepResult]) -> None:
    """Read the gradient norms of the steps since the last look at them.

    Looking at each step would make the host wait for the device at each. The first norm that is
    not finite has stopped all updates since (`step_when_finite`). Norms are those of all ranks,
    so all raise or none.
    """
    norms = torch.stack([result.gradient_norm for result in results]).tolist()
    for result, norm in zip(results, norms, strict=True):
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient at step {result.step} is {norm} (loss {result.loss.item():.4g}); "
                "lower optimizer.learning_rate or look at the batch's images: "
                + ", ".join(result.uids)
            )
