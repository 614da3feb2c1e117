"""The arithmetic of a run's towers, and the scale that keeps small gradients in float16."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from vlm.distributed.sharding import local

PrecisionName: TypeAlias = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_SCALE, _GROWTH_STEPS = 2.0**16, 2000  # as torch.amp.GradScaler has them


class Precision:
    """How the towers compute; features, loss, gradients of weights and weights are float32.

    float16 has too few exponents for small gradients. The loss is therefore multiplied by a scale
    before it is differentiated, and the gradients divided by it (Micikevicius et al. 2018, section
    3.2). A step whose gradients are not finite is skipped and halves the scale; many good ones in a
    row double it. torch's `GradScaler` does the same; this one never makes the host wait for the
    device, and knows sharded gradients. Its two numbers are a part of a checkpoint.
    """

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        self.dtype = _DTYPES[name]
        """What the towers compute in; None for the weights' own type."""
        self._device = device
        scale = _FIRST_SCALE if self.is_scaled else 1.0
        self._scale = torch.tensor(scale, device=device)
        self._good_steps = torch.tensor(0, device=device)

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled: then a gradient that is not finite belongs to the search."""
        return self.dtype is torch.float16

    @property
    def scale(self) -> Tensor:
        """What the loss is multiplied by."""
        return self._scale

    @property
    def may_overflow(self) -> Tensor | None:
        """Whether a gradient that is not finite may be the scale's fault; None where none is."""
        return self._scale > 1 if self.is_scaled else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which towers compute in this precision."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Differentiate a scalar, scaled; `unscale` follows after the last of a step."""
        torch.autograd.backward(loss * self._scale if self.is_scaled else loss)

    @torch.no_grad()
    def unscale(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        if self.is_scaled:
            gradients = [local(each.grad) for each in parameters if each.grad is not None]
            torch._foreach_mul_(gradients, 1 / self._scale)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Halve the scale where the step was skipped, on the device; double it once in a while."""
        if not self.is_scaled:
            return
        self._good_steps.copy_(torch.where(skipped, 0, self._good_steps + 1))
        doubled = self._good_steps >= _GROWTH_STEPS
        factor = torch.where(skipped, 0.5, torch.where(doubled, 2.0, 1.0))
        self._scale.mul_(factor).clamp_(min=1.0)
        self._good_steps.masked_fill_(doubled, 0)

    def measured(self) -> dict[str, float]:
        """Return what metrics have of it; reading the scale waits for the device."""
        return {"loss_scale": self._scale.item()} if self.is_scaled else {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the scale and the number of good steps since it changed."""
        return {"scale": self._scale, "good_steps": self._good_steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set both; a run that went in another precision starts to search anew."""
        if self.is_scaled:
            self._scale.copy_(state["scale"])
            self._good_steps.copy_(state["good_steps"])
