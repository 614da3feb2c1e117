"""A trace of a few steps, for Perfetto or chrome://tracing, and a snapshot of a GPU's memory."""

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vlm.training.config import ProfileConfig

PROFILE_NAME = "profile"
"""The folder of a run that holds them."""

_MOST_ALLOCATIONS = 100_000  # the last ones; a step of a large model makes thousands


class Profiler:
    """Records the steps that a configuration names; it changes nothing in what they compute."""

    def __init__(self, folder: Path, config: ProfileConfig, *, rank: int) -> None:
        self._steps = config.first_and_last if rank in config.ranks else None
        first, last = config.first_and_last or (0, 0)
        self._path = folder / PROFILE_NAME / f"steps-{first}-{last}-rank-{rank}"
        self._trace: profile | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what was recorded of a run that ends before the last of the steps."""
        self._stop()

    def begin(self, step: int) -> None:
        """Be called before each step, which is counted from 1."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._trace is None and step == first:
            self._start()
        elif step > last:
            self._stop()

    def _start(self) -> None:
        activities, on_gpu = [ProfilerActivity.CPU], torch.cuda.is_available()
        if on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MOST_ALLOCATIONS)
        self._trace = profile(activities=activities, record_shapes=True)
        self._trace.start()

    def _stop(self) -> None:
        if self._trace is None:
            return
        trace, self._trace, self._steps = self._trace, None, None
        trace.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            # A pickle of plain lists, as pytorch.org/memory_viz reads it; nothing here loads it.
            dump: Any = torch.cuda.memory._dump_snapshot
            dump(f"{self._path}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        trace.export_chrome_trace(f"{self._path}.trace.json.gz")
