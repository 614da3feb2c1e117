"""Averages of the weights over steps, which often score better than the last weights alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.distributed.sharding import local, reshard
from vlm.training.saving.checkpoint import Checkpoint

_STATISTICS = ("running_mean", "running_var")  # of batch norms


class MovingAverage:
    """An exponential moving average of a model's weights; a part of a checkpoint.

    After step t it moves by `1 - min(decay, (1 + t) / (10 + t))` towards the weights, so that it
    reaches back over at most about a tenth of the steps so far and forgets what it started from
    (the warm-up of TensorFlow's `ExponentialMovingAverage`). The running statistics of batch norms
    are averaged like weights, since those of other weights would not fit.

    Averages have the type, device and shards of their weights.

    Args:
        model: The model, as it is trained; its parameters are the same tensors ever after.
        decay: In [0, 1); the nearer to 1, the more steps count.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        statistics = (
            (name, buffer)
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[2] in _STATISTICS
        )
        self._live = dict[str, Tensor]((*model.named_parameters(), *statistics))
        self._averages = {name: each.detach().clone() for name, each in self._live.items()}

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Take in the weights after step number `step`, unless its update was `skipped`.

        A device decides that by itself, without the host.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages = [local(each) for each in self._averages.values()]
        live = [local(each) for each in self._live.values()]
        if skipped is None or skipped.device.type == "cpu":
            if not skipped:
                torch._foreach_lerp_(averages, live, weight)
            return
        weights = torch.where(skipped, 0.0, weight)
        for average, each in zip(averages, live, strict=True):
            average.lerp_(each, weights.to(average.dtype))

    @torch.no_grad()
    def move(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Move by `weight`, of the whole way, towards other weights with the same names."""
        averages = [local(each) for each in self._averages.values()]
        others = [local(state[name]).to(each.device) for name, each in self._averages.items()]
        torch._foreach_lerp_(averages, others, weight)

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the weights as they are."""
        for name, average in self._averages.items():
            average.copy_(self._live[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages in the place of the weights within a `with` block, bit for bit.

        Every rank enters and leaves it at the same points.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        reshard(self._model)
        for name, live in self._live.items():
            weights = live.detach().clone()  # one tensor at a time, for memory
            live.copy_(self._averages[name])
            self._averages[name].copy_(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by the names of their weights."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the averages; a `KeyError` names one that is missing."""
        for name, average in self._averages.items():
            average.copy_(state[name])


def mean_of_checkpoints(model: nn.Module, checkpoints: Sequence[Checkpoint]) -> MovingAverage:
    """Return the mean of a model's weights in several checkpoints.

    Raises:
        CheckpointError: one belongs to another model.
    """
    mean = MovingAverage(model, 0.0)
    for number, checkpoint in enumerate(checkpoints, start=1):
        checkpoint.load({"model": _Taken(model, mean, 1 / number)})
    return mean


@dataclass(frozen=True)
class _Taken:
    """The part `model` of a checkpoint, which moves an average instead of the model's weights."""

    model: nn.Module
    average: MovingAverage
    weight: float

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.average.move(state, self.weight)
