"""Passes over tensors without contents: what a model of any size computes and holds on a device.

Floating-point tensors have shapes and no values, so that a model of ten billion weights takes no
memory. Integers and masks are real: which words are hidden, and how long texts are, decide what is
computed.
"""

import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


# torch knows the attention of GPUs by itself; on a CPU it has another name and the same products.
@register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu)
def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


@register_flop_formula(_aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


class HollowTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on tensors without contents, and counts the bytes that are alive.

    Tensors that are there before its `with` block are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.fake_device = torch.device("cpu")
        self.flops = 0
        """Of matrix products, attention and convolutions."""
        self.log: list[tuple[int, int]] = []
        """The storages that came and went, in order: a number, and its bytes or minus these."""
        self._numbers: dict[int, int] = {}
        self._came = 0

    def hollow(self, tensor: Tensor) -> Tensor:
        """Return a tensor without contents in the place of one."""
        with self.fake:
            return torch.empty_like(tensor, device="cpu")

    def number_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage in the log, if it is alive and in there."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

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
        if func in _INDEXED:  # how many places a mask has is known of a real one alone
            args, real = (args[0], _places(args[1]), *args[2:]), [args[0]]
        if real:
            args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        with self.fake:
            result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._numbers:
            return
        self._came += 1
        self._numbers[key] = self._came
        self.log.append((self._came, storage.nbytes()))
        weakref.finalize(storage, self._forget, key, self._came, storage.nbytes())

    def _forget(self, key: int, number: int, size: int) -> None:
        if self._numbers.get(key) == number:
            del self._numbers[key]
        self.log.append((number, -size))


def _places(indices: Any) -> list[Tensor | None]:
    """Return indices with masks as the places where they are true."""
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
        found += index.nonzero(as_tuple=True) if is_mask else [index]
    return found


@dataclass(frozen=True)
class Pass:
    """What one forward and one backward pass compute and hold."""

    flops: int
    """Of matrix products, attention and convolutions."""
    saved: int
    """Bytes that are alive between the passes: activations, and what the model returned."""
    log: list[tuple[int, int]] = field(repr=False)
    gradients: frozenset[int] = field(repr=False)
    """The numbers in the log of what the parameters' gradients lie in."""

    def peak(self, *, ratio: float = 1.0) -> int:
        """Return the most bytes that are alive at a time, a ratio of each gradient counted."""
        alive = most = 0.0
        for number, size in self.log:
            alive += size * (ratio if number in self.gradients else 1.0)
            most = max(most, alive)
        return round(most)


def run_pass(model: nn.Module, run: Callable[[], Tensor], *, mode: HollowTensors) -> Pass:
    """Differentiate what `run` gives of a model without contents, and return what that takes.

    Args:
        model: Its gradients are dropped before and after.
        run: Makes a scalar.
        mode: The model's tensors are its own.
    """
    model.zero_grad()
    mode.log.clear()
    mode.flops = 0
    with mode:
        result = run()
        saved = sum(size for _, size in mode.log)
        result.backward()  # type: ignore[no-untyped-call]
    gradients = (each.grad for each in model.parameters() if each.grad is not None)
    numbers = frozenset(number for each in gradients if (number := mode.number_of(each)))
    log = list(mode.log)
    model.zero_grad()
    return Pass(mode.flops, saved, log, numbers)


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
) -> Mapping[str, int]:
    """Return the bytes of an optimizer's state by kind, after a step on hollow parameters."""
    found: dict[str, int] = {}
    with mode:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    model.zero_grad()
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                found[key] = found.get(key, 0) + value.nbytes
    return found
