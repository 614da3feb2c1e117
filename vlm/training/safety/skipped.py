"""Samples that a run could not use: `skipped.jsonl`, and the bound on their ratio."""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.utils import gather_object
from tqdm import tqdm

from vlm.batches.batch import SkippedSample
from vlm.errors import TrainingError
from vlm.files import write_file
from vlm.training.monitoring.reporter import read_records
from vlm.training.progress import Progress

SKIPPED_NAME = "skipped.jsonl"
WINDOW = 100_000
"""Samples that the bound looks back on; at the start of a run it allows as many at once."""

# What differs between two messages of the same kind: addresses, names in quotes, numbers.
_PARTICULARS = re.compile(r"\S*[/#]\S*|'[^']*'|0x[0-9a-f]+|\d+")


class SkippedLog:
    """Writes what was skipped, and ends a run that skips too much; every rank has the same.

    Records of steps after `progress`, left by a run that was cut off, are removed: resuming skips
    the same samples again.
    """

    def __init__(
        self, folder: Path, *, progress: Progress, allowed_share: float, writes: bool
    ) -> None:
        self._path, self._allowed_share, self._writes = folder / SKIPPED_NAME, allowed_share, writes
        self._records = [r for r in read_records(self._path) if r["step"] <= progress.step]
        self.total = len(self._records)
        """Skipped in the whole run so far."""
        self._noted: list[tuple[int, SkippedSample]] = []
        if writes and self._path.exists():
            write_file(self._path, "".join(map(_line, self._records)).encode())

    def note(self, step: int, skipped: Sequence[SkippedSample]) -> None:
        """Keep what this rank has skipped in a step until it is recorded."""
        self._noted += [(step, each) for each in skipped]

    def record(self, progress: Progress) -> None:
        """Write what all ranks have skipped since the last call; a collective operation.

        Raises:
            TrainingError: the last samples hold more of them than `allowed_share` permits.
        """
        skipped: list[tuple[int, SkippedSample]] = gather_object(self._noted)
        self._noted = []
        self.total += len(skipped)
        if not skipped:
            return
        if self._writes and not self._records:
            reason = skipped[0][1].reason
            tqdm.write(f"a sample is skipped: {reason}; {self._path} lists all", sys.stderr)
        records = [{"step": step} | each._asdict() for step, each in sorted(skipped)]
        first = progress.step * (1 - WINDOW / max(progress.samples, WINDOW))  # of the window
        self._records = [each for each in self._records if each["step"] > first] + records
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(map(_line, records))
        reasons = [record["reason"] for record in self._records]
        allowed = int(self._allowed_share * WINDOW)
        if len(reasons) > allowed:
            kind, number = Counter(_PARTICULARS.sub("", each) for each in reasons).most_common(1)[0]
            example = next(each for each in reasons if _PARTICULARS.sub("", each) == kind)
            raise TrainingError(
                f"{len(reasons)} of the last {min(progress.samples, WINDOW):,} samples could not "
                f"be used, more than data.allowed_share {self._allowed_share:g} permits ({allowed} "
                f"of {WINDOW:,}); {number} of them like this one: {example}; {self._path} lists all"
            )


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
