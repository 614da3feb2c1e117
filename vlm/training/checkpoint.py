"""Checkpoints that are whole or absent: written under another name, flushed, renamed, verified.

A checkpoint holds a few named parts, each with `state_dict` and `load_state_dict`: tensors go to
`NAME.safetensors`, plain numbers to `state.json`.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from vlm.errors import CheckpointError
from vlm.files import sha256_of, write_folder

_STATE = "state.json"
_FOLDER_NAME = re.compile(r"step-(\d{8})")


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
