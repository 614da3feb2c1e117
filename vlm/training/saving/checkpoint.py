"""Checkpoints that are whole or absent: filled under another name, flushed, sealed, renamed.

A checkpoint holds a few named parts, each with `state_dict` and `load_state_dict`: tensors go to
`NAME.safetensors`, divided ones to a file a rank, plain numbers to `state.json`. `MANIFEST.json`
is written last. It has the hash of every file, and its own: whatever changes later is noticed.

Every rank takes part in every call, and all return or raise alike.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from tqdm import tqdm

import vlm
from vlm.distributed.groups import SINGLE, RankGroup, exchange
from vlm.errors import CheckpointError, VlmError
from vlm.files import (
    begin_folder,
    clear_disk_errors,
    finish_folder,
    flush_to_disk,
    sha256_of,
    temporary_folder,
)
from vlm.training.saving.tensor_files import StoredTensors, TensorSnapshot, is_of, snapshot_of

MANIFEST_NAME, STATE_NAME = "MANIFEST.json", "state.json"

Resume = Literal["auto", "never"] | Path
"""Whether a run goes on: from its newest checkpoint that is whole, from none, or from this one."""

_FOLDER_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER_NAME = re.compile(r"\.step-\d+\.(partial|old|removed)")

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is there, whole."""

    folder: Path
    step: int
    world_size: int
    """Number of ranks that wrote it."""
    files: tuple[str, ...]
    numbers: Mapping[str, dict[str, Any]]
    """What is no tensor, by part."""

    def load(self, parts: Mapping[str, Stateful]) -> list[str]:
        """Restore parts in place; return what starts anew or is left out, a sentence each.

        A part may have a method `layout(key)`, which gives the tensor whose division among ranks a
        tensor of it shall have; without it that is the tensor that the part has by that name.

        Raises:
            CheckpointError: the checkpoint belongs to another model.
        """
        said = [
            f"{name} starts anew: the checkpoint has none" for name in parts - self.numbers.keys()
        ]
        said += [f"{name} is left out: the run has none" for name in self.numbers.keys() - parts]
        try:
            for name, part in parts.items():
                if name in self.numbers:
                    part.load_state_dict(self.numbers[name] | self._tensors(name, part))
        except (RuntimeError, KeyError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            reason = shorten(reason, width=200, placeholder=" ...")  # on one line
            raise CheckpointError(
                f"{self.folder} belongs to another configuration: {reason}"
            ) from error
        return said

    def _tensors(self, name: str, part: Stateful) -> dict[str, Tensor]:
        stored = StoredTensors([self.folder / file for file in self.files if is_of(name, file)])
        layout = getattr(part, "layout", None) or part.state_dict().get
        return {key: stored.read(key, layout(key)) for key in stored.keys()}  # noqa: SIM118


def open_checkpoint(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Check every file of a checkpoint; return it.

    Raises:
        CheckpointError: it is damaged; the message names the file.
    """
    if not any((folder / name).exists() for name in (MANIFEST_NAME, STATE_NAME)):
        raise CheckpointError(f"{folder} is no checkpoint; expected a run's checkpoints/step-...")
    file = folder / MANIFEST_NAME
    try:
        content = file.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        manifest.pop("sha256")
        if _sealed(manifest) != content:
            raise ValueError("its own sha256 is another one")
        for name, known in manifest["files"].items() if verify else ():
            file = folder / name
            if (size := file.stat().st_size) != known["bytes"]:
                raise ValueError(f"{size} bytes; expected {known['bytes']}")
            if (found := sha256_of(file)) != known["sha256"]:
                raise ValueError(f"sha256 {found[:12]}; expected {known['sha256'][:12]}")
        file = folder / STATE_NAME
        numbers = json.loads(file.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{file} is damaged: {reason}") from error
    return Checkpoint(
        folder=folder,
        step=manifest["step"],
        world_size=manifest["world_size"],
        files=tuple(manifest["files"]),
        numbers=numbers,
    )


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    """Holds one folder a checkpoint."""
    keep: int
    """How many of the newest are kept."""
    keep_every: int = 0
    """Steps between those that are never removed; 0 for none."""
    in_background: bool = False
    """Whether training goes on while a copy of its state is written."""
    group: RankGroup = SINGLE
    """All ranks, apart from the groups of training (`host_group`)."""
    _at: int = field(default=-1, init=False)
    """The step of the last one that was written or loaded."""
    _writing: Future[None] | None = field(default=None, init=False)
    """The one that is being written in the background."""
    _writer: ThreadPoolExecutor = field(init=False, repr=False)
    """Has no thread before it has something to write."""

    def __post_init__(self) -> None:
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def save(self, step: int, parts: Mapping[str, Stateful], *, required: bool = False) -> None:
        """Write a checkpoint; older ones are removed only once it is complete.

        What the disk refuses does not end a run whose older checkpoints are there: it is said, and
        the next one is due as ever. In the background, only the copy of the state is made here.

        Args:
            step: Names the checkpoint.
            parts: By name.
            required: Whether a failure is an error, as it is for the last one of a run, which this
                waits for in any case.

        Raises:
            CheckpointError: it cannot be written, and is required; or a number is not finite.
        """
        self.finish()  # one at a time
        if step == self._at:  # as where a signal comes right after it
            return
        apart = self.in_background and not required
        numbers, tensors = {}, {}
        for name, part in parts.items():
            state = part.state_dict()
            own = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            tensors[name] = snapshot_of(own, self.group, is_copy=apart)
            numbers[name] = {key: value for key, value in state.items() if key not in own}
        for name, snapshot in tensors.items():
            self._together(partial(snapshot.check_finite, name))
        copied = json.loads(json.dumps(numbers))
        if apart:
            self._writing = self._writer.submit(self._keep, step, copied, tensors, False)
        else:
            self._keep(step, copied, tensors, required)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written in the background, if there is one."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def find(self, resume: Resume) -> Checkpoint | None:
        """Return the checkpoint to go on from: rank 0 decides and verifies, all have the same.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
        """
        folder = self._together(lambda: self._choose(resume) if self.group.rank == 0 else None)[0]
        if folder is None:
            return None
        return self._together(lambda: open_checkpoint(folder, verify=False))[self.group.rank]

    def load(self, found: Checkpoint, parts: Mapping[str, Stateful]) -> None:
        """Restore parts in place, and say what the checkpoint does not have of them.

        Raises:
            CheckpointError: the checkpoint belongs to another model, or a rank cannot read it.
        """
        for line in self._together(lambda: found.load(parts))[0]:
            self._say(line)
        self._at = found.step

    def latest(self) -> Path | None:
        """Return the folder of the newest checkpoint, which is not verified."""
        return next(reversed(self._complete()), None)

    def newest(self, number: int, *, until: int) -> list[Checkpoint]:
        """Return the newest ones up to a step, oldest first; what is damaged is said and left out.

        All ranks have the same.
        """
        self.finish()

        def choose() -> list[Path]:
            wrong: list[str] = []
            earlier = (each for each in self._whole(wrong) if _step_of(each) <= until)
            chosen = list(islice(earlier, number))
            for each in wrong:
                self._say(f"warning: {each}; it is passed over")
            return chosen[::-1]

        folders = self._together(lambda: choose() if self.group.rank == 0 else [])[0]
        opened = self._together(lambda: [open_checkpoint(each, verify=False) for each in folders])
        return opened[self.group.rank]

    def _choose(self, resume: Resume) -> Path | None:
        if isinstance(resume, Path):
            return open_checkpoint(resume).folder
        wrong: list[str] = []
        found = next(self._whole(wrong), None) if resume == "auto" else None
        if wrong and found is None:
            raise CheckpointError(
                f"no checkpoint of {self.folder} can be gone on from: {'; '.join(wrong)}"
            )
        if wrong:
            self._say(f"warning: {'; '.join(wrong)}; going on from {found} instead")
        return found

    def _whole(self, wrong: list[str]) -> Iterator[Path]:
        """Give the checkpoints that verify, newest first, and add to `wrong` why others do not."""
        for folder in reversed(self._complete()):
            try:
                yield open_checkpoint(folder).folder
            except CheckpointError as error:
                wrong.append(str(error))

    def _keep(
        self,
        step: int,
        numbers: Mapping[str, dict[str, Any]],
        tensors: Mapping[str, TensorSnapshot],
        required: bool,
    ) -> None:
        """Write a checkpoint and remove older ones, or say why not."""
        target = self.folder / f"step-{step:08d}"
        try:
            self._write(target, step, numbers, tensors)
        except CheckpointError as error:
            self._on_main(lambda: shutil.rmtree(temporary_folder(target), ignore_errors=True))
            newest = self.latest()
            left = f"the newest one is {newest}" if newest else "there is no older one"
            if required:
                raise CheckpointError(f"{error}; {left}") from error
            self._say(f"warning: {error}; the run goes on and {left}")
            return
        self._at = step
        self._on_main(self._purge)

    def _write(
        self,
        target: Path,
        step: int,
        numbers: Mapping[str, Any],
        tensors: Mapping[str, TensorSnapshot],
    ) -> None:
        """Fill the folder on all ranks, then seal and move it on rank 0."""
        temporary = temporary_folder(target)

        def begin() -> None:
            self._clear(step)
            begin_folder(target)

        def fill() -> list[Path]:
            with clear_disk_errors(target):
                files = [
                    file
                    for name, snapshot in tensors.items()
                    for file in snapshot.write(temporary, name, self.group)
                ]
                if self.group.rank == 0:
                    files.append(temporary / STATE_NAME)
                    files[-1].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
                flush_to_disk(*files)
            return files

        def described() -> dict[str, dict[str, Any]]:
            return {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                for file in fill()
            }

        def finish() -> None:
            content = {
                "step": step,
                "samples": numbers.get("progress", {}).get("samples"),
                "world_size": self.group.size,
                "versions": {"vlm": vlm.__version__, "torch": torch.__version__},
                "files": {name: known for own in files for name, known in own.items()},
            }
            with clear_disk_errors(target):
                (temporary / MANIFEST_NAME).write_bytes(_sealed(content))
            finish_folder(temporary, target)

        self._on_main(begin)
        files = self._together(described)
        self._on_main(finish)

    def _clear(self, step: int) -> None:
        """Remove what dead processes left, and move away what this run did not come from.

        A run that goes on from an older checkpoint than the newest would else take that one, which
        is damaged or of another course, the next time that it goes on.
        """
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if _LEFTOVER_NAME.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        for path in self._complete():
            if _step_of(path) >= step:
                number = 1
                while (aside := path.with_name(f"aside-{number}-{path.name}")).exists():
                    number += 1
                path.rename(aside)

    def _purge(self) -> None:
        """Remove older checkpoints; one that cannot be is left, and said."""
        for path in self._complete()[: -self.keep]:
            if self.keep_every and _step_of(path) % self.keep_every == 0:
                continue
            removed = path.with_name(f".{path.name}.removed")
            try:
                path.rename(removed)  # at once, so that no half of it is taken for a checkpoint
                shutil.rmtree(removed)
            except OSError as error:
                self._say(f"warning: cannot remove {path}, an older checkpoint: {error.strerror}")

    def _complete(self) -> list[Path]:
        """Return the finished checkpoints, oldest first; a partial one has another name."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _FOLDER_NAME.fullmatch(path.name)]
        return sorted(found, key=_step_of)

    def _on_main(self, act: Callable[[], None]) -> None:
        """Have rank 0 do something."""
        self._together(lambda: act() if self.group.rank == 0 else None)

    def _together(self, act: Callable[[], T]) -> list[T]:
        """Do something on every rank; return what each found, or raise on all what one raised."""
        mine: tuple[T | None, str]
        try:
            mine = act(), ""
        except VlmError as error:
            mine = None, str(error)
        except (OSError, SafetensorError) as error:
            mine = None, f"cannot read or write a checkpoint: {error}"
        found = exchange(mine, self.group)
        for rank, (_, wrong) in enumerate(found):
            if wrong:
                raise CheckpointError(f"rank {rank}: {wrong}" if rank else wrong)
        return [cast(T, result) for result, _ in found]

    def _say(self, line: str) -> None:
        if self.group.rank == 0:
            tqdm.write(line, sys.stderr)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return a manifest's bytes: its content, and the hash of that."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()
