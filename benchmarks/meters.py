"""What a piece of code keeps in memory and sends, counted from the operations it dispatches."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMeter(TorchDispatchMode):
    """Counts bytes of tensors alive, and collectives with their bytes, inside its `with` block.

    Bytes on the wire are those a bandwidth-optimal algorithm sends from each rank: with k ranks,
    (k - 1) / k of the whole for a gather or a reduce-scatter, twice that for an all-reduce.
    """

    def __init__(self, *already_there: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.bytes_sent = 0.0
        self.collectives: dict[str, int] = {}
        self._known: set[int] = set()
        for tensor in already_there:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it made."""
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], args)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

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
