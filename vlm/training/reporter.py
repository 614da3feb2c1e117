"""What a run reports: `metrics.jsonl`, TensorBoard and the progress bar."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from vlm.training.state import Progress

METRICS_NAME = "metrics.jsonl"

T = TypeVar("T")


class Reporter:
    """Writes the records of a run; where it is not active it does nothing.

    Records of steps after `progress`, left by a run that was cut off after its last checkpoint, are
    removed.
    """

    def __init__(self, folder: Path, *, samples: int, progress: Progress, active: bool) -> None:
        self._active = active
        if not active:
            return
        # Here, since reports import this module to read metrics.
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_NAME
        kept = [record for record in read_records(path) if record["step"] <= progress.step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=progress.step + 1)
        self._bar = tqdm(
            total=samples, initial=progress.samples, unit="sample", unit_scale=True, desc="training"
        )

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._bar.close()
            self._board.close()
            self._file.close()

    def advance(self, samples: int) -> None:
        """Move the progress bar, which shows samples a second and the time left."""
        if self._active:
            self._bar.update(samples)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values that a run had after `step` steps."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if "loss" in values:
            self._bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


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
