"""A disk that fails, or a process that dies, at the i-th call that writes, moves or removes."""

import contextlib
import errno
import io
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save
from torch import nn

from vlm.errors import CheckpointError
from vlm.training.progress import Progress
from vlm.training.saving import tensor_files
from vlm.training.saving.checkpoint import Checkpoints, open_checkpoint
from vlm.training.saving.state import OptimizerState

CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")
"""Functions of `os` that are counted, next to opening a file and every write to one."""

DIED = 77
"""The exit code of a process that died at its call."""


class Faults:
    """Counts calls below a folder, and lets one of them fail.

    Args:
        at: The number of the call that fails, from 0; None for no call.
        how: `die`, which ends the process there, or the name of an error, such as `ENOSPC`.
    """

    def __init__(self, at: int | None = None, how: str = "die") -> None:
        self.at, self.how = at, how
        self.calls: list[str] = []

    def count(self, name: str, before: Callable[[], object] = lambda: None) -> None:
        """Count a call; where it is the one that fails, do half of its work, and fail."""
        self.calls.append(name)
        if len(self.calls) - 1 != self.at:
            return
        before()
        if self.how == "die":
            os._exit(DIED)
        number = getattr(errno, self.how)
        raise OSError(number, os.strerror(number))

    @contextlib.contextmanager
    def injected(self) -> Iterator["Faults"]:
        """Count within a `with` block."""
        with contextlib.ExitStack() as stack:
            for name in CALLS:
                stack.enter_context(patch.object(os, name, self._counted(name)))
            stack.enter_context(patch.object(io, "open", self._open))
            stack.enter_context(patch.object(tensor_files, "save_file", self._save_file))
            yield self

    def _counted(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.count(f"{name} {' '.join(map(str, arguments[:2]))}")
            return real(*arguments, **options)

        return call

    def _open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return _OPEN(file, mode, *arguments, **options)
        self.count(f"open {file}")
        return _Written(_OPEN(file, mode, *arguments, **options), self)

    def _save_file(self, tensors: dict[str, Any], path: Path, metadata: Any = None) -> None:
        """Write as safetensors does, in a few writes that can fail."""
        content = save(tensors, metadata)
        block = len(content) // 3 + 1
        with self._open(path, "wb") as file:
            for start in range(0, len(content), block):
                file.write(content[start : start + block])


_OPEN = io.open


class _Written:
    """A file whose writes are counted; one that fails has written half."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, content: Any) -> int:
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        self._faults.count(f"write {self._file.name}", half)
        written: int = self._file.write(content)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def state_of(step: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model whose numbers tell the step, and the parts of a checkpoint of it."""
    model = nn.Linear(40, 30)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        nn.init.constant_(parameter, step)
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in model.parameters():
        nn.init.constant_(parameter, step)
    parts = {"model": model, "optimizer": OptimizerState(model, optimizer)}
    return model, parts | {"progress": Progress(step, step * 8)}


def save_step(folder: Path, step: int, *, keep: int = 1) -> None:
    """Save the state of a step."""
    Checkpoints(folder, keep=keep).save(step, state_of(step)[1])


def loaded_step(folder: Path) -> int | None:
    """Load the newest whole checkpoint and check its numbers; return its step."""
    checkpoints = Checkpoints(folder, keep=1)
    found = checkpoints.find("auto")
    if found is None:
        return None
    model, parts = state_of(0)
    checkpoints.load(found, parts)
    step = parts["progress"].step
    assert found.step == step
    assert all(bool((parameter == step).all()) for parameter in model.parameters())
    return int(step)


CASES = ("the first one", "the second one", "after leftovers", "over a damaged one")
"""What is there before the save in which something fails."""


def prepare(folder: Path, case: str) -> int | None:
    """Write what is there before; return the step of the newest whole checkpoint."""
    if case == "the first one":
        return None
    save_step(folder, 1)
    if case == "after leftovers":
        shutil.copytree(folder / "step-00000001", folder / ".step-00000002.partial")
        shutil.copytree(folder / "step-00000001", folder / ".step-00000000.removed")
    if case == "over a damaged one":
        save_step(folder, 2, keep=2)
        (folder / "step-00000002/model.safetensors").write_bytes(b"")
    return 1


def calls_of_a_save(folder: Path, case: str) -> list[str]:
    """Return the calls of a save that nothing happens to."""
    folder.parent.mkdir(parents=True, exist_ok=True)  # or they would have more folders to make
    prepare(folder, case)
    state_of(0)  # what torch imports and writes at first use is no call of ours
    with Faults().injected() as faults:
        save_step(folder, 2)
    return faults.calls


def is_move(call: str) -> bool:
    """Say whether a call moves a checkpoint to its place."""
    return call.startswith("rename ") and ".partial " in call


def die_at_every_call(folder: Path, case: str) -> int:
    """Let a process die at each call of a save; the older or the newer checkpoint must be whole,
    and the next save must clean up. Return the number of calls.
    """
    calls = calls_of_a_save(folder / "counted", case)
    moved = next(number for number, call in enumerate(calls) if is_move(call))
    for at, call in enumerate(calls):
        own = folder / str(at)
        before = prepare(own, case)
        if (child := os.fork()) == 0:
            with Faults(at).injected():
                save_step(own, 2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED, call
        assert loaded_step(own) == (2 if at > moved else before), call
        save_step(own, 3)
        assert loaded_step(own) == 3, call
        assert not [path for path in own.iterdir() if path.name.startswith(".")], call
    return len(calls)


def fail_at_every_call(folder: Path, case: str, how: str) -> int:
    """Let the disk fail at each call of a save; the run must go on, with a whole checkpoint.
    Return the number of calls.
    """
    calls = calls_of_a_save(folder / "counted", case)
    for at, call in enumerate(calls):
        own = folder / str(at)
        before = prepare(own, case)
        with Faults(at, how).injected(), contextlib.redirect_stderr(io.StringIO()) as said:
            save_step(own, 2)
        found = loaded_step(own)
        if found == before:
            assert "the run goes on and" in said.getvalue(), call
        else:
            assert found == 2, call
        save_step(own, 3)
        assert loaded_step(own) == 3, call
    return len(calls)


def damage_everywhere(folder: Path, number: int, seed: int = 0) -> int:
    """Damage files of the newest of two checkpoints, one at a time; each must be named, and the
    older checkpoint taken. Return how often that was so.
    """
    for step in (1, 2):
        save_step(folder, step, keep=2)
    newest, draw = folder / "step-00000002", random.Random(seed)
    files = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    for case in range(number):
        path = list(files)[case % len(files)]
        kind = ("flip", "cut", "grow", "clear", "remove")[case // len(files) % 5]
        damage(path, kind, draw)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            assert loaded_step(folder) == 1, (path.name, kind)
        wanted = rf"warning: \S+{path.name} is damaged: .*; going on from \S+00001 instead"
        assert re.search(wanted, said.getvalue()), (path.name, kind, said.getvalue())
        with pytest.raises(CheckpointError, match=f"{path.name} is damaged: "):
            open_checkpoint(newest)
        path.write_bytes(files[path])
    assert loaded_step(folder) == 2
    return number


def damage(path: Path, kind: str, draw: random.Random) -> None:
    """Damage one file at a random place."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "grow":
        content.append(draw.randrange(256))
    elif kind == "clear":
        end = max(at + 1, len(content) - 8)
        content[at:end] = bytes(byte ^ 0xFF for byte in content[at:end])
    path.write_bytes(content)
    if kind == "remove":
        path.unlink()
