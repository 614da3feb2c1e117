"""What a piece of code keeps in memory and sends, counted from the operations it dispatches."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMeter(TorchDispatchMode):
    """Counts bytes of tensors alive, and collectives with their bytes, inside its `with` block.

    Bytes on the wire are those a bandwidth-optimal algorithm sends from each rank: with k ranks,
    (k - 1) / k of the whole for a gather or a reduce-scatter, twice that for an all-reduce.
    """

    def __init__(self, *already_there: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self.bytes_sent = 0.0
        self.collectives: dict[str, int] = {}
        self._storages: WeakValueDictionary[int, torch.UntypedStorage] = WeakValueDictionary()
        self._see(already_there)

    @property
    def live(self) -> int:
        """Bytes alive now; asked of each storage, because sharded weights empty theirs."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it made."""
        if DTensor in types:
            return NotImplemented  # it comes back as what it consists of on this rank
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], args)
        result = func(*args, **(kwargs or {}))
        self._see(tree_leaves(result))
        return result

    def _see(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.device.type != "meta":  # which has sizes and no memory
                    self._storages[storage._cdata] = storage
        self.peak = max(self.peak, self.live)

    def _count(self, name: str, args: Any) -> None:
        self.collectives[name] = self.collectives.get(name, 0) + 1
        leaves = tree_leaves(args)
        sizes = [leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)]
        boxed = next(leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject))
        ranks = dist.ProcessGroup.unbox(boxed).size()
        whole = {"allreduce_": 2 * sum(sizes), "send": sum(sizes) * ranks / max(ranks - 1, 1)}
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole[name] = max(sizes)
        elif name in ("allgather_", "reduce_scatter_") or (name == "scatter_" and len(sizes) > 1):
            whole[name] = min(sizes) * ranks
        self.bytes_sent += whole.get(name, 0) * (ranks - 1) / ranks
