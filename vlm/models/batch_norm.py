"""Batch normalisation over the images of all ranks, on any device."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.distributed.gather import sum_over
from vlm.distributed.groups import RankGroup


def synchronize_batch_norm(model: nn.Module, group: RankGroup, device: torch.device) -> nn.Module:
    """Make every batch normalisation of the model use the statistics of the whole group.

    On accelerators this is torch's `SyncBatchNorm`, which has no CPU kernel; there
    `GroupBatchNorm2d` takes its place. Parameters, buffers and their names stay as they are, and
    the model is changed in place where it can be.
    """
    if group.size == 1:
        return model
    if device.type != "cpu":
        synchronized: nn.Module = convert_sync_batchnorm(  # type: ignore[no-untyped-call]
            model, group.process_group
        )
        return synchronized
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, GroupBatchNorm2d(child, group))
    return model


def kept_statistics(model: nn.Module) -> AbstractContextManager[None]:
    """Leave the running statistics of a model's batch norms alone while it is run.

    For passes over images of another kind than evaluation's. Batches are normalised as ever.
    """
    return temporarily(_norms(model), "momentum", 0.0)


def has_statistics(model: nn.Module) -> bool:
    """Say whether a model has batch norms."""
    return bool(_norms(model))


def _norms(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if isinstance(each, _BatchNorm | GroupBatchNorm2d)]


@contextmanager
def temporarily(modules: Iterable[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Set an attribute of modules within a `with` block."""
    before = [(module, getattr(module, name)) for module in modules]
    for module, _ in before:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, old in before:
            setattr(module, name, old)


def keep_locked_statistics(model: nn.Module) -> None:
    """Put batch norms whose parameters are locked into evaluation mode.

    Their running statistics belong to the locked weights; call it after `model.train()`.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm | GroupBatchNorm2d) and not any(
            parameter.requires_grad for parameter in module.parameters()
        ):
            module.eval()


class GroupBatchNorm2d(nn.Module):
    """The batch normalisation `norm` with the statistics of a whole group of ranks.

    Follows Ioffe and Szegedy 2015, algorithm 1, over the union of the ranks' batches. timm's
    layers that fuse dropout and activation into the normalisation keep them.
    """

    def __init__(self, norm: nn.BatchNorm2d, group: RankGroup) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.eps = norm.eps
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.group = group
        if norm.momentum is None or norm.running_mean is None or not norm.affine:
            raise ValueError("expected an affine batch norm that tracks statistics by momentum")
        self.momentum = norm.momentum

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` of shape (batch, channels, height, width), in the parameters' type."""
        wide = x.to(self.weight.dtype)
        mean, variance = self._batch_statistics(wide) if self.training else (
            self.running_mean, self.running_var,
        )  # fmt: skip
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalised = (wide - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        output: Tensor = self.act(self.drop(normalised.to(x.dtype)))
        return output

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        axes = (0, 2, 3)
        count = sum_over(x.new_tensor(float(x.numel() // x.shape[1])), self.group)
        mean = sum_over(x.sum(axes), self.group) / count
        # A second pass: the mean of squares minus the squared mean would cancel digits.
        variance = sum_over((x - mean[:, None, None]).square().sum(axes), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return mean, variance
