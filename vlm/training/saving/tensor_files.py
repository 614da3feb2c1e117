"""Tensors of a checkpoint in safetensors files, whole or in the shards of several ranks.

Whole tensors go to `NAME.safetensors`, which rank 0 writes. A tensor that is divided among ranks (a
DTensor, as FSDP2 makes) goes to `NAME.rank-00003-of-00008.safetensors`, where each rank writes its
own shards, and the file's header says where they lie in the whole. Any layout reads any other: a
reader takes the parts of its own shard from wherever they are. torch's distributed checkpoints do
the same with an index that is a pickle; here there is none.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vlm.distributed.groups import RankGroup
from vlm.errors import CheckpointError

_PLACES = "places"  # in the header: for each shard its first indices, and the shape of the whole


class _Region(NamedTuple):
    """A box in a tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def common(self, other: "_Region") -> "_Region":
        """Return what lies in both; its shape has a 0 or less where nothing does."""
        start = tuple(map(max, self.start, other.start))
        ends = zip(self.start, self.shape, other.start, other.shape, strict=True)
        end = (min(a + size, b + other_size) for a, size, b, other_size in ends)
        return _Region(start, tuple(e - s for s, e in zip(start, end, strict=True)))

    def within(self, other: "_Region") -> tuple[slice, ...]:
        """Return the slices of this region in a tensor that holds another one."""
        begins = [a - b for a, b in zip(self.start, other.start, strict=True)]
        return tuple(slice(b, b + size) for b, size in zip(begins, self.shape, strict=True))


@dataclass(frozen=True)
class TensorSnapshot:
    """What one rank writes of a part's tensors: copies in host memory."""

    whole: dict[str, Tensor]
    shards: dict[str, Tensor]
    places: dict[str, tuple[Sequence[int], Sequence[int]]]
    """By shard: its first indices, and the shape of the whole tensor."""

    def check_finite(self, part: str) -> None:
        """Refuse what nothing can go on from; a `CheckpointError` names the first tensor."""
        for key, tensor in (*self.whole.items(), *self.shards.items()):
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"the {part} of the run holds numbers that are not finite, first in {key}; "
                    "expected finite ones, so no checkpoint is written"
                )

    def write(self, folder: Path, name: str, group: RankGroup) -> list[Path]:
        """Write this rank's files; return their paths. Only rank 0 writes whole tensors."""
        files = []
        if self.shards:
            file = folder / f"{name}.rank-{group.rank:05d}-of-{group.size:05d}.safetensors"
            save_file(self.shards, file, metadata={_PLACES: json.dumps(self.places)})
            files.append(file)
        if self.whole:
            file = folder / f"{name}.safetensors"
            save_file(self.whole, file)
            files.append(file)
        return files


def snapshot_of(
    state: Mapping[str, Tensor], group: RankGroup, *, is_copy: bool = True
) -> TensorSnapshot:
    """Copy this rank's part of a state to host memory.

    Without `is_copy` tensors that are there already are shared with the state.
    """

    def on_host(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=is_copy).contiguous()

    whole: dict[str, Tensor] = {}
    shards: dict[str, Tensor] = {}
    places: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, DTensor):
            if group.rank == 0:
                whole[key] = on_host(tensor)
        elif _is_first_replica(tensor) and 0 not in (region := _own_region(tensor)).shape:
            shards[key] = on_host(tensor.to_local())
            places[key] = (region.start, tensor.shape)
    return TensorSnapshot(whole, shards, places)


def is_of(name: str, file: str) -> bool:
    """Say whether a file holds tensors of the part with this name."""
    return re.fullmatch(rf"{re.escape(name)}(\.rank-\d+-of-\d+)?\.safetensors", file) is not None


class StoredTensors:
    """The tensors of one part, from its files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._shards: dict[str, list[tuple[Any, _Region]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            opened: Any = safe_open(file, framework="pt")
            places = json.loads((opened.metadata() or {}).get(_PLACES, "{}"))
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                shape = tuple(opened.get_slice(key).get_shape())
                start, whole = places.get(key, ([0] * len(shape), shape))
                self._shapes[key] = tuple(whole)
                self._shards.setdefault(key, []).append((opened, _Region(tuple(start), shape)))

    def keys(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._shards)

    def read(self, key: str, like: Tensor | None) -> Tensor:
        """Return a tensor, in host memory; where `like` is a DTensor, divided as that is.

        Raises:
            ValueError: the files lack a part of it, or it has another shape than `like`.
        """
        if not isinstance(like, DTensor):
            return self._region(key, _Region((0,) * len(self._shapes[key]), self._shapes[key]))
        if self._shapes[key] != tuple(like.shape):
            raise ValueError(f"{key} has the shape {self._shapes[key]}, here {tuple(like.shape)}")
        local = self._region(key, _own_region(like)).to(like.device)
        return DTensor.from_local(
            local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def _region(self, key: str, wanted: _Region) -> Tensor:
        shards = self._shards[key]
        if len(shards) == 1 and shards[0][1] == wanted:
            tensor: Tensor = shards[0][0].get_tensor(key)
            return tensor
        result, found = None, 0
        for opened, region in shards:
            common = wanted.common(region)
            if min(common.shape, default=1) <= 0:
                continue
            read = opened.get_slice(key)[common.within(region)]
            if result is None:
                result = torch.empty(wanted.shape, dtype=read.dtype)
            result[common.within(wanted)] = read
            found += read.numel()
        if found != math.prod(wanted.shape):
            raise ValueError(f"{key} lacks {math.prod(wanted.shape) - found} of its numbers")
        if result is None:  # this rank's shard is empty
            opened, region = shards[0]
            first = opened.get_slice(key)[tuple(slice(0, 0) for _ in region.shape)]
            result = torch.empty(wanted.shape, dtype=first.dtype)
        return result


def _own_region(tensor: DTensor) -> _Region:
    """Return which part of a tensor this rank holds."""
    if not all(each.is_replicate() or type(each) is Shard for each in tensor.placements):
        raise ValueError(f"a tensor with the placements {tensor.placements} cannot be kept")
    shape, start = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return _Region(tuple(start), tuple(shape))


def _is_first_replica(tensor: DTensor) -> bool:
    """Say whether this rank writes its shard, which others may hold as well (HSDP)."""
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and not any(
        place
        for place, placement in zip(coordinate, tensor.placements, strict=True)
        if placement.is_replicate()
    )
