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

POLL_S = 2.0
"""Seconds after which a trainer that waits for data looks after its workers."""

_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def start_worker(trainer: int, number: int) -> None:
    """Prepare worker `number` of the process `trainer`, which alone is asked to end."""
    signal.set_wakeup_fd(-1)  # it is the trainer's
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:  # Linux
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer:  # it has ended already
        os._exit(1)


def batches_of(
    loader: DataLoader[Any], *, stall_s: float, until: Callable[[], bool] | None = None
) -> Generator[Any]:
    """Start the workers of a loader, and give its batches; an error among them is raised.

    Args:
        loader: With a timeout of `POLL_S` where it has workers, which begin by `start_worker`.
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
    return _watched(batches, workers, end, stall_s, until)


def _watched(
    batches: Iterator[Any],
    workers: Sequence[BaseProcess],
    end: Callable[[], object],
    stall_s: float,
    until: Callable[[], bool] | None,
) -> Generator[Any]:
    alive: dict[int, tuple[float, float]] = {}
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error):
                    raise
                if until is not None and until():
                    return
                _look_after(workers, alive, stall_s)
            else:
                if isinstance(batch, VlmError):
                    raise batch
                alive.clear()
                yield batch
    finally:
        end()


def _look_after(
    workers: Sequence[BaseProcess], alive: dict[int, tuple[float, float]], stall_s: float
) -> None:
    """Note when each worker was last seen to do anything; refuse to wait for one that does not.

    A slow download or a slow disk wakes its reader at times. A process that is stopped, or waits
    for a device that never answers, neither runs nor wakes.
    """
    now = time.monotonic()
    for number, worker in enumerate(workers):
        activity = _activity(worker.pid)
        before, since = alive.get(number, (-1.0, now))
        if activity != before:
            alive[number] = (activity, now)
        elif now - since >= stall_s:
            raise DataError(
                f"data worker {number} (process {worker.pid}) has done nothing for "
                f"{now - since:.0f} seconds while a batch was missing, and is taken for stalled; "
                "expected some sign of life within data.stall_s"
            )


def _activity(pid: int | None) -> float:
    """Return a number that grows whenever a process runs: its seconds, and its switches."""
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
