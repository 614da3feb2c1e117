"""The parts of a run's state that a checkpoint keeps, next to its model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import CheckpointError
from vlm.training.config import TrainConfig, config_as_plain


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's tensors by `PARAMETER.KEY`; its settings come from the configuration."""

    model: nn.Module
    """Names the parameters."""
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype = torch.float32
    """Of the moments, whatever a checkpoint's are."""

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and step counts."""
        names: dict[Tensor, str] = {each: name for name, each in self.model.named_parameters()}
        return {
            f"{names[parameter]}.{key}": value
            for parameter, slots in self.optimizer.state.items()
            for key, value in slots.items()
        }

    def layout(self, key: str) -> Tensor | None:
        """Return the parameter as which a moment is divided among ranks; step counts are not."""
        name, slot = key.rsplit(".", 1)
        return None if slot == "step" else dict(self.model.named_parameters()).get(name)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each parameter its moments; one that was not trained so far has none yet.

        Raises:
            ValueError: there are moments for what is not trained, or of another shape.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        indices = {parameter: index for index, parameter in enumerate(parameters)}
        trained = {name: each for name, each in self.model.named_parameters() if each in indices}
        slots: dict[int, dict[str, Tensor]] = {}
        for full_name, tensor in state.items():
            name, key = full_name.rsplit(".", 1)
            # Step counts are scalars, moments have their parameter's shape.
            if name not in trained or tensor.shape not in (trained[name].shape, torch.Size()):
                raise ValueError(
                    f"it has optimizer state for {name}, which is frozen or of another shape here"
                )
            slots.setdefault(indices[trained[name]], {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        # The fused step walks a parameter and its moments side by side in memory, so moments must
        # lie as their parameter does (channels last); a file keeps their values only.
        for parameter, slot in self.optimizer.state.items():
            for key, value in slot.items():
                if key != "step":
                    slot[key] = torch.empty_like(parameter, dtype=self.dtype).copy_(value)


@dataclass(frozen=True)
class Settings:
    """The settings of a run: those of a checkpoint are compared with when the run goes on."""

    config: TrainConfig

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, nested as the settings are."""
        return config_as_plain(self.config)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep those that the run has now: `resuming.py` has compared them."""


@dataclass(frozen=True)
class SourceFingerprints:
    """What a run's sources hold, by their names; when it goes on, they must hold the same."""

    found: Mapping[str, str]

    def state_dict(self) -> dict[str, Any]:
        """Return plain texts."""
        return dict(self.found)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with what they were; a `CheckpointError` names one that has changed."""
        for name, fingerprint in self.found.items():
            if state.get(name, fingerprint) != fingerprint:
                raise CheckpointError(
                    f"the source {name!r} no longer holds what the run has read: its shards have "
                    "other names, bytes or numbers of samples; expected what they were, or another "
                    "`name` in data.sources, by which it is read from its start"
                )
