"""Checkpoints that are whole or absent: written beside, flushed, renamed, verified when read."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm.errors import CheckpointError
from vlm.files import sha256_of, write_folder

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_FOLDER_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come; together with its configuration this is the state of its data."""

    step: int
    """Optimizer steps taken."""
    samples: int
    """Samples read by all processes."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Holds one folder a checkpoint.
        keep: How many of the newest are kept.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a checkpoint; older ones are removed only once it is complete."""
        with write_folder(self.folder / f"step-{progress.step:08d}") as temporary:
            save_file(_on_cpu(model.state_dict()), temporary / _MODEL)
            save_file(_on_cpu(_optimizer_tensors(model, optimizer)), temporary / _OPTIMIZER)
            hashes = {name: sha256_of(temporary / name) for name in (_MODEL, _OPTIMIZER)}
            state = {"step": progress.step, "samples": progress.samples, "sha256": hashes}
            (temporary / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(old)

    def load_latest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Restore the newest checkpoint in place; None if there is none.

        Raises:
            CheckpointError: the newest checkpoint is damaged or belongs to another model.
        """
        complete = self._complete()
        if not complete:
            return None
        folder = complete[-1]
        progress = _verify(folder)
        try:
            model.load_state_dict(load_file(folder / _MODEL))
            _restore_optimizer(model, optimizer, load_file(folder / _OPTIMIZER))
        except (RuntimeError, KeyError, ValueError) as error:
            reason = shorten(str(error), width=200, placeholder=" ...")  # of one line
            raise CheckpointError(f"{folder} belongs to another configuration: {reason}") from error
        return progress

    def _complete(self) -> list[Path]:
        """Return the finished checkpoints, oldest first; a partial one has another name."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _FOLDER_NAME.fullmatch(path.name))


def _verify(folder: Path) -> Progress:
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            found = sha256_of(folder / name)
            if found != expected:
                raise CheckpointError(
                    f"{folder / name} is damaged: sha256 {found[:12]}, expected {expected[:12]}; "
                    f"remove {folder} to resume from the checkpoint before it"
                )
        return Progress(step=state["step"], samples=state["samples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is damaged ({error}); remove it to resume from the checkpoint before it"
        ) from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name AdamW's tensors `PARAMETER.KEY`; its other settings come from the configuration."""
    names: dict[Tensor, str] = {each: name for name, each in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value
        for parameter, slots in optimizer.state.items()
        for key, value in slots.items()
    }


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Give each parameter its own moments again; one that was not trained so far has none yet.

    Raises:
        ValueError: there are moments of what is not trained, or of another shape.
    """
    places = {
        parameter: place
        for place, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"])
    }
    trained = {name: each for name, each in model.named_parameters() if each in places}
    slots: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit(".", 1)
        if name not in trained or tensor.shape not in (trained[name].shape, torch.Size()):
            raise ValueError(f"it has trained {name}, which is not trained here")
        slots.setdefault(places[trained[name]], {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    # The fused step walks a parameter and its moments side by side in memory, so moments must lie
    # as their parameter does (channels last); a file keeps their values only.
    for parameter, slot in optimizer.state.items():
        for key, value in slot.items():
            if value.shape == parameter.shape:
                slot[key] = torch.empty_like(parameter).copy_(value)
