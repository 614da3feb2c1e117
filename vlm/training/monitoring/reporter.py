"""What a run reports: `metrics.jsonl`, trackers, and the progress on stderr."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from vlm.files import write_file
from vlm.training.progress import Progress

if TYPE_CHECKING:
    from vlm.training.monitoring.trackers import Trackers

METRICS_NAME = "metrics.jsonl"
_SCORE = "/mean_recall"
"""End of the names that an evaluation has for each language."""

T = TypeVar("T")


class Reporter:
    """Writes the records of a run; where it is not active it does nothing.

    Records of steps after `progress`, left by a run that was cut off after its last checkpoint, are
    removed: those steps are taken again. A terminal shows a bar, a log file a line a report.
    """

    def __init__(
        self,
        folder: Path,
        *,
        samples: int,
        progress: Progress,
        active: bool,
        trackers: "Trackers | None" = None,
    ) -> None:
        self._active = active
        if not active:
            return
        self._progress, self._samples, self._trackers = progress, samples, trackers
        path = folder / METRICS_NAME
        kept = [record for record in read_records(path) if record["step"] <= progress.step]
        write_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=samples,
            initial=progress.samples,
            unit="sample",
            unit_scale=True,
            desc="training",
            disable=None,  # that is, where stderr is no terminal
        )

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        self._bar.close()
        self._file.close()
        if self._trackers:
            self._trackers.close()

    def advance(self, samples: int) -> None:
        """Move the progress bar, which shows samples a second and the time left."""
        if self._active:
            self._bar.update(samples)

    def record(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the values that a run had after `step` steps; None is what is not known."""
        if not self._active:
            return
        # What is not finite has no number in JSON.
        known = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in values.items()
        }
        line = {"step": step, "samples": self._progress.samples, **known}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._show(step, known)
        if self._trackers:
            self._trackers.log(step, known)

    def flush_to_disk(self) -> None:
        """Be called before a checkpoint, so that no loss of power leaves a gap before it."""
        if self._active:
            os.fsync(self._file.fileno())

    def _show(self, step: int, values: Mapping[str, float | None]) -> None:
        loss, rate = values.get("loss"), values.get("samples_per_s")
        shown = {
            name: f"{value:.3f}"
            for name, value in values.items()
            if value is not None and (name == "loss" or name.endswith(_SCORE))
        }
        line = [f"{name} {value}" for name, value in shown.items()]
        if loss is not None and not self._bar.disable:
            self._bar.set_postfix(loss=shown["loss"], refresh=False)
            return
        if rate:
            left = (self._samples - self._progress.samples) / rate
            line += [
                f"{rate:,.0f} samples/s", f"{values['data_wait_ratio'] or 0:.0%} waiting for data",
                f"{tqdm.format_interval(left)} left",
            ]  # fmt: skip
        if line:
            tqdm.write(f"step {step:,}: {', '.join(line)}", sys.stderr)


class Pace:
    """The speed of training since the last report, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._since, self._waited, self._samples = time.perf_counter(), 0.0, 0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on, and count the time that each is waited for."""
        source = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time within out."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def advance(self, samples: int) -> None:
        """Count samples trained on."""
        self._samples += samples

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call."""
        elapsed = time.perf_counter() - self._since
        rates = {
            "samples_per_s": self._samples / elapsed,
            "data_wait_ratio": self._waited / elapsed,
        }
        self._restart()
        return rates


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the lines of JSON that a run wrote; a last line that was cut off is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
