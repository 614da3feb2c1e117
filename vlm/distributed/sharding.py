"""Weights, gradients and optimizer states sharded over ranks (FSDP2), as the launcher was asked."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from vlm.errors import ConfigError

_FSDP, _PARALLELISM = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"
_SHARDED, _REPLICATED = "PARALLELISM_CONFIG_DP_SHARD_SIZE", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE"


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a model's weights are divided over ranks."""

    ranks: int
    """Neighbouring ranks that hold one copy of the weights together."""
    copies: int
    """Of the weights; each `ranks` neighbours hold one."""
    reshard_after_forward: bool
    """Whether a block's weights are gathered again for its backward pass, to save memory."""

    def __str__(self) -> str:
        copies = f", in {self.copies} copies" if self.copies > 1 else ""
        kept = "" if self.reshard_after_forward else ", kept for the backward pass"
        return f"weights sharded over {self.ranks} ranks{copies}{kept}"

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the ranks, copies by shards; a collective operation."""
        if self.copies == 1:
            return init_device_mesh(device.type, (self.ranks,), mesh_dim_names=("shard",))
        return init_device_mesh(
            device.type, (self.copies, self.ranks), mesh_dim_names=("replicate", "shard")
        )


def launched_sharding(world_size: int) -> Sharding | None:
    """Return what `accelerate launch` was configured for; None where weights are whole everywhere.

    With `distributed_type: FSDP` its file says `fsdp_version: 2`, `fsdp_reshard_after_forward`, and
    under `parallelism_config` the numbers of ranks that share (`dp_shard_size`) and of copies
    (`dp_replicate_size`). All of these reach a process as variables of its environment.

    Raises:
        ConfigError: it was configured for something else, or not for this number of ranks.
    """
    if not _is_on(_FSDP):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            f"fsdp_version is {os.environ.get('FSDP_VERSION', '1')} in accelerate's configuration; "
            "expected 2"
        )
    for variable in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if _is_on(variable):
            raise ConfigError(
                f"{variable.lower()} is true in accelerate's configuration; expected false, and "
                "adapt.grad_checkpointing to save memory"
            )
    ranks, copies = world_size, 1
    if _is_on(_PARALLELISM):
        ranks, copies = (int(os.environ.get(name, "1")) for name in (_SHARDED, _REPLICATED))
    if ranks * copies != world_size:
        raise ConfigError(
            f"accelerate's configuration has dp_shard_size {ranks} and dp_replicate_size {copies}; "
            f"expected their product to be the number of ranks, {world_size}"
        )
    reshards = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "true"
    return Sharding(ranks, copies, reshards)


@contextmanager
def sharding_is_ours() -> Iterator[None]:
    """Hide the launcher's configuration of FSDP from accelerate, which would shard by itself.

    It can on GPUs only, knows a module's blocks by the names of their classes, and takes no
    parameter without dimensions, such as a temperature.

    Raises:
        ConfigError: it was configured for DeepSpeed.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "distributed_type is DEEPSPEED in accelerate's configuration, and DeepSpeed takes no "
            "parameter without dimensions, such as a temperature, and moves locked weights; "
            "expected FSDP, as in configs/accelerate/fsdp2-zero2.yaml for what ZeRO-2 divides and "
            "fsdp2.yaml for ZeRO-3"
        )
    hidden = {name: os.environ.pop(name) for name in (_FSDP, _PARALLELISM) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


class ShardedModel:
    """A model that is sharded in place, a block at a time; all that is in no block is one unit.

    Parameters keep their names and become DTensors, sharded by their first dimension. Those without
    dimensions, such as temperatures, stay whole on every rank; their gradients are averaged too.

    Args:
        model: On its device, with all hooks and wrappers of its blocks in place.
        blocks: What is gathered for its passes and freed again, one at a time.
        sharding: The ranks.
        device: The model's.
        dtype: To which blocks' weights are rounded before they travel; None leaves them as they
            are. Gradients travel in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        sharding: Sharding,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.sharding = sharding
        self._syncs = True
        for tensor in model.parameters():
            tensor.data = tensor.data.contiguous()  # FSDP2 takes no other memory format
        mesh, whole = sharding.mesh(device), {p for p in model.parameters() if p.ndim == 0}
        rounded = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self._blocks: list[FSDPModule] = [
            fully_shard(
                block,
                mesh=mesh,
                reshard_after_forward=sharding.reshard_after_forward,
                mp_policy=rounded,
                ignored_params=whole,
            )
            for block in blocks
        ]
        self._model: FSDPModule = fully_shard(model, mesh=mesh, ignored_params=whole)
        # Else the first module that runs would be the root, which in an evaluation is a block.
        fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]
        for parameter in whole:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._average)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients of backward passes unaveraged and whole: they add up on their rank."""
        self._set_sync(False)
        try:
            yield
        finally:
            self._set_sync(True)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Have every rank hold all weights within a `with` block, where passes send nothing.

        All ranks enter it at the same point; what they do in it is their own affair.
        """
        units = [*self._blocks, self._model]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for block in self._blocks:
                block.set_reshard_after_forward(self.sharding.reshard_after_forward, recurse=False)
            self.forget_passes()  # whose order differs by rank

    def forget_passes(self) -> None:
        """Free gathered weights after forward passes without backward passes.

        By the order of these passes the next backward pass would gather weights ahead of need.
        """
        self._model.reset_iter_state()

    def _set_sync(self, syncs: bool) -> None:
        self._syncs = syncs
        self._model.set_requires_gradient_sync(syncs)

    def _average(self, parameter: Tensor) -> None:
        if self._syncs and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which is all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; a collective operation where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return a module's state on the CPU; every rank takes part, and those that `keep` have it."""
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        value = whole(tensor)
        if keep:
            state[name] = value.detach().cpu()
    return state


def reshard(model: nn.Module) -> None:
    """Free the copies of whole weights that passes without gradients have left."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of gradients, of all ranks where they are sharded."""
    # torch's functions for many tensors take sharded ones or whole ones, and not both.
    kinds: Mapping[bool, list[Tensor]] = {
        kind: [each for each in gradients if isinstance(each, DTensor) == kind]
        for kind in (False, True)
    }
    norms = [whole(nn.utils.get_total_norm(each)) for each in kinds.values() if each]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm, that of all parameters on all ranks; return what it was."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = norm_of(gradients)
    torch._foreach_mul_(
        [local(each) for each in gradients], (max_norm / (norm + 1e-6)).clamp(max=1)
    )
    return norm


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
