"""Checkpoints that are whole or absent: written under another name, flushed, renamed, verified.

A checkpoint holds a few named parts, each with `state_dict` and `load_state_dict`: tensors go to
`NAME.safetensors`, plain numbers to `state.json`.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from vlm.errors import CheckpointError
from vlm.files import sha256_of, write_folder

_STATE = "state.json"
_FOLDER_NAME = re.compile(r"step-(\d{8})")


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Samples read by all processes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the two numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the two numbers."""
        self.step, self.samples = state["step"], state["samples"]


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's tensors by `PARAMETER.KEY`; its other settings come from the configuration."""

    model: nn.Module
    """Names the parameters."""
    optimizer: torch.optim.Optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return the moments and step counts."""
        names: dict[Tensor, str] = {each: name for name, each in self.model.named_parameters()}
        return {
            f"{names[parameter]}.{key}": value
            for parameter, slots in self.optimizer.state.items()
            for key, value in slots.items()
        }

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
                if value.shape == parameter.shape:
                    slot[key] = torch.empty_like(parameter).copy_(value)


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


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    """Holds one folder a checkpoint."""
    keep: int
    """How many of the newest are kept."""
    writes: bool = True
    """Whether this rank writes; all others only take part."""

    def save(self, step: int, parts: Mapping[str, Stateful]) -> None:
        """Write a checkpoint; older ones are removed only once it is complete.

        Every rank calls this, since a sharded part can be collected by all ranks together only.
        """
        states = {name: part.state_dict() for name, part in parts.items()}
        if not self.writes:  # nor waits: the next step's collectives do
            return
        with write_folder(self.folder / f"step-{step:08d}") as temporary:
            numbers: dict[str, Any] = {}
            hashes: dict[str, str] = {}
            for name, state in states.items():
                if not all(isinstance(value, Tensor) for value in state.values()):
                    numbers[name] = state
                    continue
                file = temporary / f"{name}.safetensors"
                save_file(
                    {key: each.detach().contiguous().cpu() for key, each in state.items()}, file
                )
                hashes[file.name] = sha256_of(file)
            content = json.dumps(numbers | {"sha256": hashes}, indent=1)
            (temporary / _STATE).write_text(content + "\n", encoding="utf-8")
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(old)

    def load_latest(self, parts: Mapping[str, Stateful]) -> bool:
        """Restore the newest checkpoint in place; return False if there is none.

        Raises:
            CheckpointError: the newest checkpoint is damaged or belongs to another model.
        """
        complete = self._complete()
        if not complete:
            return False
        folder = complete[-1]
        numbers = _verify(folder)
        try:
            for name, part in parts.items():
                file = folder / f"{name}.safetensors"
                part.load_state_dict(load_file(file) if file.exists() else numbers[name])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            reason = shorten(reason, width=200, placeholder=" ...")  # on one line
            raise CheckpointError(f"{folder} belongs to another configuration: {reason}") from error
        return True

    def _complete(self) -> list[Path]:
        """Return the finished checkpoints, oldest first; a partial one has another name."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _FOLDER_NAME.fullmatch(path.name))


def _verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint; return its numbers."""
    try:
        state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            found = sha256_of(folder / name)
            if found != expected:
                raise CheckpointError(
                    f"{folder / name} is damaged: sha256 {found[:12]}, expected {expected[:12]}; "
                    f"remove {folder} to resume from the checkpoint before it"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({error}); remove it to resume from the checkpoint before it"
        ) from error
    return state
