"""The processes that read for a trainer: they leave its signals to it, and end with it."""

import ctypes
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from torch.utils.data import DataLoader

from vlm.errors import DataError, VlmError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What schedulers send before they take a machine away, and Ctrl-C."""

POLL_S = 1.0
"""Seconds between two looks at the workers of a trainer that waits for data."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def start_worker(number: int) -> None:
    """Prepare worker `number`: its trainer alone is asked to end, and it ends with it."""
    signal.set_wakeup_fd(-1)  # it is the trainer's
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def batches_of(
    loader: DataLoader[Any], *, stall_s: float, until: Callable[[], bool] | None = None
) -> Generator[Any]:
    """Start the workers of a loader, and give its batches; an error among them is raised.

    Args:
        loader: Its workers, where it has any, begin by `start_worker`.
        stall_s: Seconds without a sign of life of a worker, while a batch is missing, that are
            taken for its end.
        until: Asked while a batch is missing; once it is true, no more are given.

    Raises:
        DataError: a worker has ended, or shows no sign of life.
    """
    others = active_children()
    batches = iter(loader)
    workers = [process for process in active_children() if process not in others]
    # Also at the end of the interpreter, which would wait for a worker that stands still.
    end = weakref.finalize(batches, _end, workers, os.getpid())
    return _watched(batches, _Watch(workers, stall_s, until), end)


def _watched(batches: Iterator[Any], watch: "_Watch", end: Callable[[], object]) -> Generator[Any]:
    try:
        while True:
            try:
                with watch:
                    batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                if watch.is_over:
                    return
                if found := watch.found or watch.ended():
                    raise DataError(found) from None
                raise
            if isinstance(batch, VlmError):
                raise batch
            yield batch
    finally:
        watch.close()
        end()


class _Watch:
    """Looks after workers from a thread while their trainer waits, in a `with` block, for a batch.

    The trainer itself cannot: a batch is received from its worker step by step, and one that stops
    in between holds the trainer in a system call. So a worker that is given up is killed, which
    ends the call.
    """

    def __init__(
        self, workers: Sequence[BaseProcess], stall_s: float, until: Callable[[], bool] | None
    ) -> None:
        self.found = ""
        """What is wrong with a worker that was given up."""
        self.is_over = False
        """Whether no more batches are wanted."""
        self._workers, self._stall_s, self._until = workers, stall_s, until
        self._since: float | None = None
        self._closed = threading.Event()
        if workers:
            threading.Thread(target=self._look, name="data workers", daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def ended(self) -> str:
        """Say which worker has ended, where one has."""
        for number, worker in enumerate(self._workers):
            worker.join(1)
            if worker.exitcode:
                return (
                    f"data worker {number} (process {worker.pid}) has ended with exit code "
                    f"{worker.exitcode}; it may have run out of memory"
                )
        return ""

    def _look(self) -> None:
        alive: dict[BaseProcess, tuple[float, float]] = {}
        while not self._closed.wait(POLL_S):
            since, now = self._since, time.monotonic()
            if since is None or now - since < POLL_S:
                alive.clear()
                continue
            if self._until is not None and self._until():
                self.is_over = True
                for worker in self._workers:
                    worker.kill()
                return
            for number, worker in enumerate(self._workers):
                activity = _activity(worker.pid)
                before, seen = alive.get(worker, (-1.0, now))
                if activity != before:
                    alive[worker] = (activity, now)
                elif now - seen >= self._stall_s:
                    self.found = (
                        f"data worker {number} (process {worker.pid}) has done nothing for "
                        f"{now - seen:.0f} seconds while a batch was missing, and is taken for "
                        "stalled; expected some sign of life within data.stall_s"
                    )
                    worker.kill()
                    return


def _activity(pid: int | None) -> float:
    """Return a number that grows whenever a process runs: its seconds, and its switches.

    A slow download or a slow disk wakes its reader at times. A process that is stopped, or waits
    for a device that never answers, neither runs nor wakes.
    """
    try:
        times = psutil.Process(pid).cpu_times()
        switches = 0
        for status in Path(f"/proc/{pid}/task").glob("*/status"):  # of every thread; Linux
            lines = status.read_text().splitlines()
            switches += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        return switches + float(times.user + times.system)
    except (psutil.Error, OSError):
        return 0.0  # it is ending, which torch notices


def _end(workers: Sequence[BaseProcess], trainer: int) -> None:
    """Kill workers that are left; torch would ask them to end, which they ignore."""
    if os.getpid() != trainer:  # in a fork, whose they are not
        return
    in_main = threading.current_thread() is threading.main_thread()
    # torch's handler would take their end for an accident.
    handler = signal.signal(signal.SIGCHLD, lambda *_: None) if in_main else None
    for worker in workers:
        worker.kill()
        worker.join()
    if in_main:
        signal.signal(signal.SIGCHLD, handler)
