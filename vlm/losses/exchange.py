"""How features and ids reach the ranks that compare them, and the check that they fit together."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed.gather import SentRows, gather_numbers, gather_rows, send_rows
from vlm.distributed.mesh import RankMesh, build_mesh
from vlm.errors import DistributedError
from vlm.losses.plan import LossPlan, dtype_named
from vlm.text.caption_ids import NO_CAPTION

Axis = Literal["row", "column"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "mps")
_MOST_COUNTS = 16


@dataclass(frozen=True, slots=True)
class Shares:
    """What the ranks of a loss group bring to a step."""

    sizes: tuple[int, ...]
    """Samples of each member of the group."""
    counts: tuple[int, ...]
    """Sums over the group of the numbers that each rank declared."""
    weight: float
    """Of this group's mean loss among the groups; 1 where all are of one size."""
    dim: int
    """Width of the features."""

    @property
    def total(self) -> int:
        """Samples of the group."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Side:
    """The images of a mesh row, or the texts of a mesh column, as this rank received them."""

    features: Float[Tensor, "rows dim"]
    ids: Int64[Tensor, "rows ids"] | None
    """An id table as `SharedIds` reads it."""
    own: slice
    """This rank's among them."""
    total: int
    """How many there are in the whole group."""
    rounded_to: torch.dtype
    """The type that holds the features without loss, which may be narrower than theirs."""

    def with_captions(self, columns: Sequence[int], total: int, *, every: bool = True) -> "Side":
        """Return those that have captions; `total` of them are in the whole group.

        Args:
            columns: Of the id table; only these stay, after the sample's number and image.
            total: How many have them in the whole group.
            every: Whether all of the captions are needed, or any.
        """
        if self.ids is None:
            return self
        ids = self.ids[:, [0, 1, *columns]]
        if total == self.total:
            return replace(self, ids=ids)
        there = ids[:, 2:] != NO_CAPTION
        present = there.all(1) if every else there.any(1)
        before, own = (int(present[span].sum()) for span in (slice(self.own.start), self.own))
        return replace(
            self,
            features=self.features[present],
            ids=ids[present],
            own=slice(before, before + own),
            total=total,
        )

    def banked(self, number: int) -> "Side":
        """Return the same without a gradient, as candidates of later micro-batches.

        Args:
            number: Of the micro-batch; its samples are not those of another.
        """
        ids = self.ids
        if ids is not None:
            ids = ids.clone()
            ids[:, 0] -= (number + 1) << 40
        return replace(self, features=self.features.detach(), ids=ids)

    def with_candidates(self, bank: "Sequence[Side]") -> "Side":
        """Return the same with banked ones behind."""
        if not bank:
            return self
        sides = (self, *bank)
        ids = None if self.ids is None else torch.cat([s.ids for s in sides if s.ids is not None])
        return replace(self, features=torch.cat([side.features for side in sides]), ids=ids)


class Exchange:
    """The mesh of a loss plan, and what travels on it.

    Making one is a collective operation, and so is every method but `id_table`.

    Raises:
        DistributedError: the plan does not fit the number of ranks (on every rank).
    """

    def __init__(self, plan: LossPlan) -> None:
        self.plan = plan
        self.mesh: RankMesh = build_mesh(plan.group_size, plan.mesh, plan.grouping)

    def declare(self, features: Mapping[str, Tensor], counts: Sequence[int] = ()) -> Shares:
        """Tell the other ranks what this one brings, and check that all of it fits together.

        Mismatched collectives would hang or read foreign memory; this costs one small message.
        Nothing is sent where a rank is a group of its own and the plan is even.

        Args:
            features: This rank's, by a name for messages.
            counts: Numbers to be summed over the group, at most 16.

        Raises:
            DistributedError: the ranks disagree, or one brings what cannot be compared (on
                every rank of the group; of the world if the plan is not even).
        """
        group = self.mesh.group if self.plan.even else self.mesh.world
        if group.size == 1 and not self.plan.check_finite and _match(features):
            samples, dim = next(iter(features.values())).shape
            return Shares((samples,), tuple(counts), 1.0, dim)
        device = next(iter(features.values())).device
        own = _declaration(features, counts, self.plan)
        table = gather_numbers(own, group, device)
        ranks = self.mesh.members if self.plan.even else range(self.mesh.world.size)
        declared = {
            rank: _Declaration._make([*numbers[:-_MOST_COUNTS], tuple(numbers[-_MOST_COUNTS:])])
            for rank, numbers in zip(ranks, table, strict=True)
        }
        _check(declared, self.plan, list(features))
        members = [declared[rank] for rank in self.mesh.members]
        samples = sum(member.rows for member in members)
        everyone = sum(each.rows for each in declared.values()) or 1
        groups = len(declared) / len(members)
        return Shares(
            sizes=tuple(member.rows for member in members),
            counts=tuple(sum(column) for column in zip(*(m.counts for m in members), strict=True)),
            weight=samples * groups / everyone,
            dim=members[0].dim,
        )

    def id_table(
        self,
        image_ids: Int64[Tensor, " local"],
        caption_ids: Sequence[Int64[Tensor, " local"]],
        shares: Shares,
    ) -> Int64[Tensor, "local ids"]:
        """Return this rank's ids as `SharedIds` reads them: sample, image, captions."""
        first = sum(shares.sizes[: self.mesh.member])
        samples = torch.arange(first, first + len(image_ids), device=image_ids.device)
        return torch.stack([samples, image_ids, *caption_ids], dim=1)

    def send(
        self,
        features: Float[Tensor, "local dim"],
        shares: Shares,
        axis: Axis,
        *,
        per_sample: int = 1,
    ) -> SentRows:
        """Start to send features along this rank's mesh row or column.

        Args:
            features: This rank's, `per_sample` of each sample.
            shares: What the ranks declared.
            axis: Along which they go.
            per_sample: How many each sample has.
        """
        plan = self.plan
        dtype = plan.accumulates_in(features.dtype)
        group = self.mesh.row if axis == "row" else self.mesh.column
        gradient_wire_dtype = plan.gradient_wire_dtype
        return send_rows(
            features,
            group,
            self._sizes(shares, axis, per_sample),
            dtype=dtype,
            wire_dtype=dtype_named(plan.wire_dtype) if plan.wire_dtype else features.dtype,
            gradient_wire_dtype=dtype_named(gradient_wire_dtype) if gradient_wire_dtype else dtype,
            overlap=plan.overlap,
        )

    def gather_ids(
        self,
        ids: Int64[Tensor, "local ids"],
        shares: Shares,
        axis: Axis,
        *,
        per_sample: int = 1,
    ) -> Int64[Tensor, "rows ids"]:
        """Return the id tables of the ranks along an axis, one below the other."""
        group = self.mesh.row if axis == "row" else self.mesh.column
        return gather_rows(ids, group, self._sizes(shares, axis, per_sample))

    def receive(
        self,
        sent: SentRows,
        ids: Int64[Tensor, "rows ids"] | None,
        shares: Shares,
        axis: Axis,
        *,
        per_sample: int = 1,
    ) -> Side:
        """Wait for the features sent along an axis, and put their ids beside them."""
        group = self.mesh.row if axis == "row" else self.mesh.column
        first = sum(self._sizes(shares, axis, per_sample)[: group.rank])
        return Side(
            features=sent.receive(),
            ids=ids,
            own=slice(first, first + len(sent.own)),
            total=shares.total * per_sample,
            rounded_to=sent.transfer.wire_dtype,
        )

    def _sizes(self, shares: Shares, axis: Axis, per_sample: int) -> list[int]:
        mesh = self.mesh
        members = mesh.row_members if axis == "row" else mesh.column_members
        return [shares.sizes[member] * per_sample for member in members]


class _Declaration(NamedTuple):
    """What a rank says of its features, in whole numbers."""

    setting: int
    """Of the plan and the names of the features."""
    rows: int
    dim: int
    dtype: int
    device: int
    other: int
    """Place of the first features that do not go with the first; 0 where all do."""
    other_rows: int
    other_dim: int
    other_dtype: int
    other_device: int
    gradients: int
    finite: int
    counts: tuple[int, ...]


def _match(features: Mapping[str, Tensor]) -> bool:
    """Say whether all features are matrices of one shape, floating type and device."""
    first = next(iter(features.values()))
    return (
        first.ndim == 2
        and first.dtype in _DTYPES
        and all(
            each.shape == first.shape and each.dtype == first.dtype and each.device == first.device
            for each in features.values()
        )
    )


def _declaration(
    features: Mapping[str, Tensor], counts: Sequence[int], plan: LossPlan
) -> list[int]:
    """Return a rank's declaration, of a fixed length so that nothing can go wrong in sending it."""
    assert len(counts) <= _MOST_COUNTS
    kinds = [
        (
            *(len(each), each.shape[1] if each.ndim == 2 else -1),
            _DTYPES.index(each.dtype) if each.dtype in _DTYPES else -1,
            _DEVICES.index(each.device.type) if each.device.type in _DEVICES else len(_DEVICES),
        )
        for each in features.values()
    ]
    other = next((k for k, kind in enumerate(kinds) if kind != kinds[0]), 0)
    needed = torch.is_grad_enabled()
    gradients = sum(1 << k for k, each in enumerate(features.values()) if each.requires_grad)
    finite = not plan.check_finite or all(each.isfinite().all() for each in features.values())
    setting = zlib.crc32(repr((plan, list(features))).encode())
    own = [setting, *kinds[0], other, *kinds[other], gradients * needed, int(finite)]
    return [*own, *counts, *[0] * (_MOST_COUNTS - len(counts))]


def _check(declared: Mapping[int, _Declaration], plan: LossPlan, names: Sequence[str]) -> None:
    """Refuse what cannot be compared; the same on every rank, since all know the same."""
    first = next(iter(declared.values()))
    for rank, each in declared.items():
        kind = each[1:5]
        if each.setting != first.setting:
            raise DistributedError(
                f"rank {rank} has another loss plan or other languages than the first of its "
                "group; expected the same on every rank"
            )
        if each.other:
            raise DistributedError(
                f"rank {rank} brings {_described(kind)} of {names[0]} and "
                f"{_described(each[6:10])} of {names[each.other]}; expected features that match"
            )
        if each.dim < 0 or each.dtype < 0:
            raise DistributedError(
                f"rank {rank} brings {_described(kind)}; expected floating point features of "
                "shape (samples, dim)"
            )
        if kind[1:] != first[2:5]:
            raise DistributedError(
                f"rank {rank} brings {_described(kind)} where the first rank of its group brings "
                f"{_described(first[1:5])}; expected the same but for the samples"
            )
        if each.gradients != first.gradients:
            raise DistributedError(
                f"rank {rank} needs gradients for other features than the first of its group; "
                "expected the same frozen towers on every rank"
            )
        if not each.finite:
            raise DistributedError(
                f"rank {rank} brings features that are not finite; expected finite ones"
            )
    rows = [each.rows for each in declared.values()]
    if plan.even and len(set(rows)) > 1:
        raise DistributedError(
            f"the ranks of a loss group bring {', '.join(map(str, rows))} samples; expected as "
            "many from each, or even=False in the loss plan"
        )


def _described(kind: Sequence[int]) -> str:
    """Return in words the rows, width, type and device of features."""
    rows, dim, dtype, device = kind
    shape = f"{rows} x {dim}" if dim >= 0 else f"{rows} x ... (not a matrix)"
    number = str(_DTYPES[dtype]).removeprefix("torch.") if dtype >= 0 else "non-float"
    where = _DEVICES[device] if device < len(_DEVICES) else "another device"
    return f"{shape} {number} features on {where}"
