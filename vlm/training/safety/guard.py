"""The guard of a step: an update that is not finite on every rank happens on none."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from vlm.distributed.groups import RankGroup
from vlm.errors import TrainingError
from vlm.files import write_file
from vlm.training.config import GuardConfig
from vlm.training.monitoring.reporter import read_records
from vlm.training.optimization.optimizer import reads_found_inf
from vlm.training.progress import Progress
from vlm.training.safety.spikes import SpikeRule

SKIPPED_STEPS_NAME = "skipped_steps.jsonl"


class Shared(NamedTuple):
    """A step's message among the ranks, on its way."""

    values: Tensor
    """The sum of the losses, and how many ranks were asked to end."""
    work: dist.Work | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks know of a step, on the host; the same everywhere but for the samples."""

    step: int
    """Steps taken, this one included, as in `metrics.jsonl`."""
    uids: tuple[str, ...]
    """The samples of this rank."""
    loss: float
    """The mean over the ranks."""
    gradient_norm: float
    limits: tuple[float, float]
    """The highest of both that the spike rule allowed; infinity without one."""
    skipped: bool
    """Whether the update was left out, but for the search of a scale."""
    overflow: bool
    """Whether it was left out for that."""
    stop: bool
    """Whether any rank was asked to end."""

    @property
    def reason(self) -> str:
        """Why the update was left out."""
        pairs = (("the loss", self.loss), ("the gradient's norm", self.gradient_norm))
        for name, value in pairs:
            if not math.isfinite(value):
                return f"{name} is {value}"
        name, value, limit = next(
            (*pair, limit)
            for pair, limit in zip(pairs, self.limits, strict=True)
            if pair[1] > limit
        )
        return f"{name} is {value:.4g}, above the {limit:.4g} of guard.spike_sigmas"


class _Pending(NamedTuple):
    """A verdict on its way from the device."""

    step: int
    uids: tuple[str, ...]
    values: Tensor
    ready: torch.Event | None


class Guard:
    """Lets an update happen on all ranks or on none, by the step's loss and gradient.

    Each step sends one small message, which also carries the wish of any rank to end. A device
    that runs ahead of the host is not waited for: it decides by itself, and the host reads the
    verdict while the next step is under way.

    Args:
        model: Its buffers, such as batch norm's running statistics, are put back when an update is
            left out, since they have seen the same numbers.
        group: All ranks.
    """

    def __init__(self, config: GuardConfig, model: nn.Module, group: RankGroup) -> None:
        self._config, self._group = config, group
        self._spikes: SpikeRule | None = None
        if config.spike_sigmas is not None:
            device = next(model.parameters()).device
            self._spikes = SpikeRule(config.spike_sigmas, config.spike_window, device)
        self.skipped = 0
        """Updates left out in the whole run, as far as the host knows."""
        self.overflows = 0
        """Updates left out in the search for a scale in float16."""
        self._in_a_row = 0
        self._buffers = [
            each
            for each in model.state_dict(keep_vars=True).values()
            if not isinstance(each, nn.Parameter)
        ]
        self._kept: list[Tensor] = []
        self._pending: list[_Pending] = []

    def begin(self) -> None:
        """Note what a forward pass changes; before it."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    def share(self, loss: Tensor, *, stop: bool) -> Shared:
        """Send this rank's loss and whether it was asked to end; a collective operation."""
        values = torch.stack([loss.detach().float(), loss.new_tensor(float(stop)).float()])
        if self._group.process_group is None:
            return Shared(values, None)
        work = dist.all_reduce(values, group=self._group.process_group, async_op=True)
        return Shared(values, work)

    @torch.no_grad()
    def update(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        uids: tuple[str, ...],
        shared: Shared,
        gradient_norm: Tensor,
        may_overflow: Tensor | None = None,
    ) -> Tensor:
        """Update the weights unless the step is bad; return whether it was, still on the device.

        Args:
            optimizer: Of the weights, with their gradients in place.
            step: Steps taken before this one.
            uids: The samples of this rank.
            shared: The message that all ranks have sent.
            gradient_norm: Of the gradient over all ranks.
            may_overflow: Whether a gradient that is not finite belongs to the search for a scale
                in float16; such a step is skipped, and is no alarm.
        """
        if shared.work is not None:
            shared.work.wait()
        measured = torch.stack(
            [shared.values[0] / self._group.size, gradient_norm.detach().float()]
        )
        limits = torch.full_like(measured, math.inf)
        if self._spikes is not None:
            limits = self._spikes.limits()
            self._spikes.take(measured, limits)
        skip = ~(measured.isfinite() & (measured <= limits)).all()
        if self._on_host(skip, optimizer):
            if skip:
                self._put_back(skip)
            else:
                optimizer.step()
        else:
            fused: Any = getattr(optimizer, "optimizer", optimizer)  # within a wrapper
            fused.found_inf = skip.float()
            optimizer.step()
            self._put_back(skip)
        overflow = measured[0].isfinite() & ~measured[1].isfinite()
        overflow = torch.zeros_like(skip) if may_overflow is None else overflow & may_overflow
        flags = torch.stack([skip, overflow, shared.values[1] > 0]).float()
        values, ready = torch.cat([measured, limits, flags]), None
        if values.device.type != "cpu":
            ready = torch.Event(values.device)
            values = values.to("cpu", non_blocking=True)
            ready.record()
        self._pending.append(_Pending(step + 1, uids, values, ready))
        return skip

    @staticmethod
    def _on_host(skip: Tensor, optimizer: torch.optim.Optimizer) -> bool:
        """Say whether the host decides, for which it has to wait for the device."""
        return skip.device.type == "cpu" or not reads_found_inf(optimizer)

    def _put_back(self, skip: Tensor) -> None:
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(skip, kept, buffer))

    def verdicts(self, *, wait: bool) -> Iterator[Verdict]:
        """Give the verdicts that the host knows by now, oldest first; the same on every rank.

        Args:
            wait: Also give that of the step at hand, for which the host may have to wait.

        Raises:
            TrainingError: the verdict before was one too many in a row.
        """
        while self._pending and (wait or self._pending[0].ready is None or len(self._pending) > 1):
            pending = self._pending.pop(0)
            if pending.ready is not None:
                pending.ready.synchronize()
            loss, norm, *limits, skipped, overflow, stop = pending.values.tolist()
            verdict = Verdict(
                step=pending.step,
                uids=pending.uids,
                loss=loss,
                gradient_norm=norm,
                limits=(limits[0], limits[1]),
                skipped=skipped > overflow,
                overflow=overflow > 0,
                stop=stop > 0,
            )
            self.skipped += verdict.skipped
            self.overflows += verdict.overflow
            if not verdict.overflow:
                self._in_a_row = self._in_a_row + 1 if verdict.skipped else 0
            wait = wait or verdict.stop  # the checkpoint to come is of the step at hand
            yield verdict
            if self._in_a_row >= self._config.max_skipped_in_a_row:
                raise TrainingError(
                    f"the updates of {self._in_a_row} steps in a row were skipped, which is as "
                    f"many as guard.max_skipped_in_a_row permits: at step {verdict.step} "
                    f"{verdict.reason}; lower optimizer.learning_rate, or look at the images of "
                    f"{', '.join(verdict.uids[:3])}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, the same on every rank."""
        state: dict[str, Any] = {
            "skipped": self.skipped, "overflows": self.overflows, "in_a_row": self._in_a_row
        }  # fmt: skip
        return state if self._spikes is None else state | {"spikes": self._spikes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the numbers."""
        self.skipped, self.overflows = state["skipped"], state["overflows"]
        self._in_a_row = state["in_a_row"]
        if self._spikes is not None and "spikes" in state:
            self._spikes.load_state_dict(state["spikes"])


class SkippedSteps:
    """Writes the steps whose updates were left out, with their samples.

    Records of steps after `progress`, left by a run that was cut off, are removed: resuming skips
    the same steps again.
    """

    def __init__(self, folder: Path, *, progress: Progress, writes: bool) -> None:
        self._path, self._writes = folder / SKIPPED_STEPS_NAME, writes
        self._last = 0
        records = read_records(self._path)
        kept = [record for record in records if record["step"] <= progress.step]
        if writes and len(kept) < len(records):
            write_file(self._path, "".join(map(_line, kept)).encode())

    def record(self, verdicts: Iterable[Verdict]) -> bool:
        """Write what all ranks have read in skipped steps; return whether one is to end the run.

        A collective operation.
        """
        stop = False
        for verdict in verdicts:
            stop |= verdict.stop
            if verdict.skipped:
                self._write(verdict)
        return stop

    def _write(self, verdict: Verdict) -> None:
        uids = gather_object(list(verdict.uids))
        goes_on, self._last = verdict.step == self._last + 1, verdict.step
        if not self._writes:
            return
        record = {
            "step": verdict.step, "reason": verdict.reason, "loss": verdict.loss,
            "gradient_norm": verdict.gradient_norm, "uids": uids,
        }  # fmt: skip
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        if not goes_on:
            said = f"the update of step {verdict.step} is skipped: {verdict.reason}"
            tqdm.write(f"{said}; {self._path} has its samples", sys.stderr)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
