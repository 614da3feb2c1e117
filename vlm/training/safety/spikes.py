"""Spikes: losses and gradient norms far above those of the last steps."""

import math
from typing import Any

import torch
from torch import Tensor


class SpikeRule:
    """Says whether a step's loss or gradient norm lies far above those of the steps before it.

    The idea is OLMo-core's optimizer that skips steps: beyond the mean of the last `window` steps
    and `sigmas` of their standard deviations. Nothing is judged before half of the window is there.
    What is beyond enters the window as the limit itself: an outlier widens it little, and a new
    level, after a change of the data for example, is the limit's own after a few steps.

    All of it stays on the device, which decides without the host.

    Args:
        sigmas: Standard deviations above the mean that are allowed.
        window: Steps that are looked back on.
        device: Where losses are.
    """

    def __init__(self, sigmas: float, window: int, device: torch.device) -> None:
        self._sigmas = sigmas
        self._values = torch.zeros(2, window, device=device)
        self._places = torch.arange(window, device=device)
        self._steps = torch.zeros((), dtype=torch.int64, device=device)

    def limits(self) -> Tensor:
        """Return the highest loss and the highest norm that are allowed; infinity while unknown."""
        window = len(self._places)
        there = self._places < self._steps
        number = there.sum().clamp(min=2)
        mean = torch.where(there, self._values, 0).sum(1) / number
        squares = torch.where(there, (self._values - mean[:, None]) ** 2, 0).sum(1)
        limits = mean + self._sigmas * (squares / (number - 1)).sqrt()
        return torch.where(self._steps >= max(window // 2, 2), limits, math.inf)

    def take(self, measured: Tensor, limits: Tensor) -> None:
        """Let the window go on by a step's loss and norm, unless one is not finite."""
        place = (self._places == self._steps % len(self._places)) & measured.isfinite().all()
        self._values = torch.where(place, torch.minimum(measured, limits)[:, None], self._values)
        self._steps += place.any()

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers: those of the window by their places, and the steps taken."""
        losses, norms = self._values.tolist()
        return {"losses": losses, "gradient_norms": norms, "steps": int(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the numbers, exactly; another window than before starts anew."""
        values = torch.tensor([state["losses"], state["gradient_norms"]])
        if values.shape == self._values.shape:
            self._values.copy_(values)
            self._steps.fill_(state["steps"])
