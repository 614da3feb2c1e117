"""Passes over tensors without contents: what a model of any size computes and holds on a device.

Floating-point tensors have shapes and no values, so that a model of ten billion weights takes no
memory. Integers and masks are real: which words are hidden, and how long texts are, decide what is
computed.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from vlm.distributed.sharding import local

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


# torch knows the attention of GPUs by itself; on a CPU it has another name and the same products.
@register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


@register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


class HollowTensors(TorchDispatchMode):
    """Runs operations on tensors without contents, and counts the bytes that are alive.

    Tensors that are there before its `with` block are not counted. Sharded weights empty and fill
    their storages where no operation shows it, so within the block resizing one is watched.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.fake_device = torch.device("cpu")
        self._sizes: dict[int, list[int]] = {}  # of storages, each in a list so that it may change
        self._patches: list[Any] = []
        self.count_anew()

    def count_anew(self) -> None:
        """Set all counts to zero: what is alive now was there before."""
        self.flops = 0
        """Of matrix products, attention and convolutions."""
        self.gathered = self.reduced = 0
        """Bytes that this rank sends in gathers, and in sums over ranks."""
        self.alive = self.peak = 0
        """Bytes of storages that came and are there, and the most at a time."""

    def hollow(self, tensor: Tensor) -> Tensor:
        """Return a tensor without contents in the place of one."""
        with self.fake:
            made = torch.empty_like(tensor, device="cpu")
        self._see(made)  # or it would seem to come with the first view of it
        return made

    def __enter__(self) -> "HollowTensors":
        """Begin to run and to count."""
        resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self._sizes:
                self._resized(self._sizes[storage._cdata], size)

        self._patches.append(patch.object(torch.UntypedStorage, "resize_", watched))
        self._patches[-1].start()
        super().__enter__()  # type: ignore[no-untyped-call]  # as above
        return self

    def __exit__(self, *error: Any) -> None:
        """End it."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # as above
        self._patches.pop().stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, for real where no argument is hollow."""
        if func is _DEVICE:  # asked for all the time
            return self.fake_device
        if DTensor in types:
            return NotImplemented  # sharded tensors come back as what they consist of
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        real = [each for each in tensors if not isinstance(each, FakeTensor)]
        if tensors and len(real) == len(tensors):
            return func(*args, **kwargs)
        if tensors and not real and func.is_view:
            return self._view(func, args, kwargs)
        if func in _INDEXED:  # how many places a mask has is known of a real one alone
            args, real = (args[0], _places(args[1]), *args[2:]), [args[0]]
        if real:
            args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        with self.fake:
            result = func(*args, **kwargs)
        if not tensors and isinstance(result, Tensor) and not result.is_floating_point():
            return func(*args, **kwargs)  # made from nothing, such as positions
        self._account(func, args, kwargs, result)
        return result

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what has no storage of its own, as `FakeTensorMode` would, in half of its time."""
        with in_kernel_invocation_manager(self.fake):
            made = func(*args, **kwargs)
        if isinstance(made, Tensor):
            return FakeTensor(self.fake, made, self.fake_device)
        return [FakeTensor(self.fake, each, self.fake_device) for each in made]

    def _account(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count an operation's FLOP, what it sends, and what it has made."""
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        if func.namespace == "c10d":
            self._count_sent(func.__name__.split(".")[0], args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)

    def _count_sent(self, name: str, args: Any) -> None:
        """Count what a bandwidth-optimal algorithm sends."""
        leaves = tree_leaves(args)
        sizes = [each.nbytes for each in leaves if isinstance(each, Tensor)]
        boxed = next(each for each in leaves if isinstance(each, torch.ScriptObject))
        ranks = dist.ProcessGroup.unbox(boxed).size()
        if name == "_allgather_base_":
            self.gathered += max(sizes) * (ranks - 1) // ranks
        elif name == "_reduce_scatter_base_":
            self.reduced += max(sizes) * (ranks - 1) // ranks
        elif name == "allreduce_":
            self.reduced += 2 * sum(sizes) * (ranks - 1) // ranks

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = [0]
            self._resized(self._sizes[key], storage.nbytes())
            weakref.finalize(storage, self._forget, key, self._sizes[key])

    def _resized(self, held: list[int], size: int) -> None:
        self.alive += size - held[0]
        self.peak = max(self.peak, self.alive)
        held[0] = size

    def _forget(self, key: int, held: list[int]) -> None:
        self._resized(held, 0)
        if self._sizes.get(key) is held:
            del self._sizes[key]


def _places(indices: Any) -> list[Tensor | None]:
    """Return indices with masks as the places where they are true."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
        found += index.nonzero(as_tuple=True) if is_mask else [index]
    return found


@dataclass(frozen=True)
class Pass:
    """What one forward and one backward pass compute, hold and send."""

    flops: int
    """Of matrix products, attention and convolutions."""
    saved: int
    """Bytes that are alive between the passes: activations, and what the model returned."""
    peak: int
    """The most bytes that are alive at a time, gradients of earlier micro-batches among them."""
    gathered: tuple[int, int]
    """Bytes that a rank sends in gathers of weights, in the forward pass and in both."""
    reduced: int
    """Bytes that it sends in sums of gradients."""


def run_pass(
    model: nn.Module,
    run: Callable[[], Tensor],
    *,
    mode: HollowTensors,
    no_sync: Callable[[], AbstractContextManager[None]] | None = None,
) -> Pass:
    """Differentiate what `run` gives of a model without contents, and return what that takes.

    Args:
        model: Its gradients are dropped before and after.
        run: Makes a scalar.
        mode: The model's tensors are its own.
        no_sync: For a step of several micro-batches: makes the context of all but the last, one of
            which runs before what is counted, and leaves its gradients.
    """
    model.zero_grad()
    mode.count_anew()
    with mode:
        if no_sync is not None:
            with no_sync():
                run().backward()
        before, mode.flops, mode.gathered, mode.reduced = mode.alive, 0, 0, 0
        result = run()
        saved, forward = mode.alive - before, mode.gathered
        result.backward()
    del result
    model.zero_grad()
    return Pass(mode.flops, saved, mode.peak, (forward, mode.gathered), mode.reduced)


def make_hollow(model: nn.Module, mode: HollowTensors) -> None:
    """Replace the parameters and buffers of a model, in place, by those without contents."""
    made: dict[Tensor, Tensor] = {}  # a parameter may have two names
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(
                        mode.hollow(parameter), requires_grad=parameter.requires_grad
                    )
                module._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.hollow(buffer)


def hollow_copy(model: nn.Module, mode: HollowTensors, *, without: tuple[Any, ...] = ()) -> Any:
    """Return a copy of a model whose tensors have no contents; the model stays as it is.

    Args:
        model: A module of any kind, with plain tensors.
        mode: The copy's tensors are its own.
        without: Objects in it that are None in the copy.
    """
    memo: dict[int, Any] = {
        id(each): nn.Parameter(mode.hollow(each), requires_grad=each.requires_grad)
        for each in model.parameters()
    }
    memo |= {id(each): mode.hollow(each) for each in model.buffers()}
    return deepcopy(model, memo | {id(each): None for each in without})


def optimizer_bytes(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, mode: HollowTensors
) -> tuple[Mapping[str, int], int]:
    """Return the bytes of an optimizer's state by kind, and the most that a step adds to them.

    The state is made anew, of what is trained.
    """
    found: dict[str, int] = {}
    optimizer.state.clear()
    with mode:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # which makes the state
        mode.count_anew()
        optimizer.step()
    model.zero_grad()
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found[key] = found.get(key, 0) + local(value).nbytes
    return found, mode.peak
