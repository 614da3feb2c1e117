"""How features and ids reach the ranks that compare them, and the check that they fit together."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlm.distributed.gather import SentRows, gather_numbers, gather_rows, send_rows
from vlm.distributed.groups import RankGroup
from vlm.distributed.mesh import RankMesh, build_mesh
from vlm.errors import DistributedError
from vlm.losses.axis import AxisLayout
from vlm.losses.matches import FIRST_CAPTION, IMAGE, SAMPLE
from vlm.losses.plan import LossPlan, dtype_named
from vlm.text.caption_ids import NO_CAPTION

Axis = Literal["row", "column"]

# What ranks declare are places in these lists: only integers travel.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "mps")
# All declarations have one length, for a gather of different lengths would hang. Enough for the
# languages, main captions and second ones, of one loss.
_MOST_COUNTS = 16


class FeatureKind(NamedTuple):
    """What features must have in common to be compared, as integers."""

    dim: int
    """Their width; -1 where they are not a matrix."""
    dtype: int
    """Place in `_DTYPES`; -1 where they are not floating-point numbers."""
    device: int
    """Place in `_DEVICES`; one beyond it for any other."""

    @classmethod
    def of(cls, features: Tensor) -> "FeatureKind":
        """Return the kind of any tensor."""
        device = features.device.type
        return cls(
            features.shape[1] if features.ndim == 2 else -1,
            _DTYPES.index(features.dtype) if features.dtype in _DTYPES else -1,
            _DEVICES.index(device) if device in _DEVICES else len(_DEVICES),
        )

    @property
    def comparable(self) -> bool:
        """Whether they are a matrix of floating-point numbers."""
        return self.dim >= 0 and self.dtype >= 0

    def __str__(self) -> str:
        shape = str(self.dim) if self.dim >= 0 else "... (not a matrix)"
        number = str(_DTYPES[self.dtype]).removeprefix("torch.") if self.dtype >= 0 else "non-float"
        where = (*_DEVICES, "another device")[self.device]
        return f"{shape} {number} features on {where}"


@dataclass(frozen=True, slots=True)
class Shares:
    """What the ranks of a loss group bring to a step."""

    sizes: tuple[int, ...]
    """Samples of each member of the group."""
    counts: tuple[int, ...]
    """Sums over the group of the numbers that each rank declared."""
    weight: float
    """Of this group's mean loss among the groups; 1 where all are of one size."""
    kind: FeatureKind

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
    layout: AxisLayout
    rounded_to: torch.dtype
    """The type that holds the features without loss, which may be narrower than theirs."""

    def with_captions(self, captions: Sequence[int], total: int, *, every: bool = True) -> "Side":
        """Return those that have captions; `total` of them are in the whole group.

        Args:
            captions: Which of the id table's captions, from 0; the others are dropped from it.
            total: How many samples of the whole group have them.
            every: Whether all of the captions are needed, or any.
        """
        if self.ids is None:
            return self
        # Every rank knows `total`, so that all filter, or none: the ids are the same everywhere.
        ids = self.ids[:, [SAMPLE, IMAGE, *(FIRST_CAPTION + k for k in captions)]]
        if total == self.layout.total:
            return replace(self, ids=ids)
        there = ids[:, FIRST_CAPTION:] != NO_CAPTION
        present = there.all(1) if every else there.any(1)
        # This rank's samples move up by as many as are dropped before them; int() waits.
        own = self.layout.own
        before, still = (int(present[span].sum()) for span in (slice(own.start), own))
        layout = AxisLayout(
            own=slice(before, before + still),
            scored=int(present.sum()),
            total=total,
            candidates=total,
        )
        return replace(self, features=self.features[present], ids=ids[present], layout=layout)

    def banked(self, number: int) -> "Side":
        """Return the same without a gradient, as candidates left by micro-batch `number`."""
        ids = self.ids
        if ids is not None:
            ids = ids.clone()
            # Sample k of another micro-batch is another sample. A group has fewer than 2**40, so
            # that each micro-batch gets a range of negative numbers of its own.
            ids[:, SAMPLE] -= (number + 1) << 40
        return replace(self, features=self.features.detach(), ids=ids)

    def with_candidates(self, bank: "Sequence[Side]") -> "Side":
        """Return the same with banked ones behind, which have no loss."""
        if not bank:
            return self
        sides = (self, *bank)
        ids = None if self.ids is None else torch.cat([s.ids for s in sides if s.ids is not None])
        candidates = sum(side.layout.total for side in sides)
        return replace(
            self,
            features=torch.cat([side.features for side in sides]),
            ids=ids,
            layout=replace(self.layout, candidates=candidates),
        )


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
        """Exchange what each rank has, and check that all of it fits together.

        Mismatched collectives would hang or read foreign memory; this costs one small message,
        for which all ranks wait.

        Args:
            features: This rank's, by a name for messages.
            counts: Numbers to be summed over the group, at most 16.

        Raises:
            DistributedError: the ranks disagree, or one brings what cannot be compared (on
                every rank of the group; of the world if the plan is not even).
        """
        # Uneven groups weigh differently, so that each has to know the samples of all others.
        group = self.mesh.group if self.plan.even else self.mesh.world
        first = next(iter(features.values()))
        if group.size == 1 and not self.plan.check_finite:
            kinds = {(len(each), FeatureKind.of(each)) for each in features.values()}
            rows, kind = kinds.pop()
            if not kinds and kind.comparable:  # nobody to ask, and nothing to complain of
                return Shares((rows,), tuple(counts), 1.0, kind)
        own = _Declaration.of(features, counts, self.plan).numbers()
        table = gather_numbers(own, group, first.device)
        ranks = self.mesh.members if self.plan.even else range(self.mesh.world.size)
        declared = {
            rank: _Declaration.read(numbers) for rank, numbers in zip(ranks, table, strict=True)
        }
        # Every rank checks the same table, so that all raise or none does.
        _check(declared, self.plan, list(features))
        members = [declared[rank] for rank in self.mesh.members]
        samples = sum(member.rows for member in members)
        everyone = sum(each.rows for each in declared.values()) or 1  # no samples: weight 0
        groups = len(declared) / len(members)
        return Shares(
            sizes=tuple(member.rows for member in members),
            counts=tuple(sum(column) for column in zip(*(m.counts for m in members), strict=True)),
            # The mean over ranks weighs groups alike, whose shares of the samples may differ.
            weight=samples * groups / everyone,
            kind=members[0].kind,
        )

    def id_table(
        self,
        image_ids: Int64[Tensor, " local"],
        caption_ids: Sequence[Int64[Tensor, " local"]],
        shares: Shares,
    ) -> Int64[Tensor, "local ids"]:
        """Return this rank's ids as `SharedIds` reads them: sample, image, captions."""
        # Numbered over the whole group, since a sample's image and text reach different ranks.
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
        """Start to send features, `per_sample` of each sample, along a row or column."""
        plan = self.plan
        # The type in which statistics and gradients add up; wider inputs widen it.
        dtype = torch.promote_types(dtype_named(plan.accum_dtype), features.dtype)
        gradient_wire_dtype = plan.gradient_wire_dtype
        return send_rows(
            features,
            *self._along(axis, shares, per_sample),
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
        return gather_rows(ids, *self._along(axis, shares, per_sample))

    def receive(
        self,
        sent: SentRows,
        ids: Int64[Tensor, "rows ids"] | None,
        shares: Shares,
        axis: Axis,
        *,
        per_sample: int = 1,
    ) -> Side:
        """Wait for the features sent along an axis, and put their ids next to them."""
        group, sizes = self._along(axis, shares, per_sample)
        features = sent.receive()
        first = sum(sizes[: group.rank])
        own, total = slice(first, first + len(sent.own)), shares.total * per_sample
        layout = AxisLayout(own, scored=len(features), total=total, candidates=total)
        return Side(features, ids, layout, rounded_to=sent.transfer.wire_dtype)

    def _along(self, axis: Axis, shares: Shares, per_sample: int) -> tuple[RankGroup, list[int]]:
        """Return the ranks of a row or column, and how many features each of them has."""
        mesh = self.mesh
        group = mesh.row if axis == "row" else mesh.column
        members = mesh.row_members if axis == "row" else mesh.column_members
        return group, [shares.sizes[member] * per_sample for member in members]


class _Declaration(NamedTuple):
    """What a rank says of its features."""

    setting: int
    """A checksum of the plan and of the names of the features."""
    rows: int
    kind: FeatureKind
    other: int
    """Place of the first features that do not go with the first; 0 where all do."""
    other_rows: int
    other_kind: FeatureKind
    gradients: int
    """One bit for each of the features, set where they need a gradient."""
    finite: int
    """1 or 0."""
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls, features: Mapping[str, Tensor], counts: Sequence[int], plan: LossPlan
    ) -> "_Declaration":
        assert len(counts) <= _MOST_COUNTS
        tensors = list(features.values())
        kinds = [(len(each), FeatureKind.of(each)) for each in tensors]
        other = next((k for k, kind in enumerate(kinds) if kind != kinds[0]), 0)
        needed = sum(1 << k for k, each in enumerate(tensors) if each.requires_grad)
        finite = not plan.check_finite or all(each.isfinite().all() for each in tensors)
        return cls(
            # Not hash(), which differs from process to process.
            zlib.crc32(repr((plan, list(features))).encode()),
            *kinds[0],
            other,
            *kinds[other],
            needed if torch.is_grad_enabled() else 0,
            int(finite),
            (*counts, *[0] * (_MOST_COUNTS - len(counts))),
        )

    def numbers(self) -> list[int]:
        return [
            self.setting, self.rows, *self.kind, self.other, self.other_rows, *self.other_kind,
            self.gradients, self.finite, *self.counts,
        ]  # fmt: skip

    @classmethod
    def read(cls, numbers: Sequence[int]) -> "_Declaration":
        (
            setting, rows, dim, dtype, device, other, other_rows, other_dim, other_dtype,
            other_device, gradients, finite, *counts,
        ) = numbers  # fmt: skip
        return cls(
            setting, rows, FeatureKind(dim, dtype, device), other, other_rows,
            FeatureKind(other_dim, other_dtype, other_device), gradients, finite, tuple(counts),
        )  # fmt: skip


def _check(declared: Mapping[int, _Declaration], plan: LossPlan, names: Sequence[str]) -> None:
    """Refuse what cannot be compared; the same on every rank, since all know the same."""
    first_rank, first = next(iter(declared.items()))
    for rank, each in declared.items():
        own = f"rank {rank} has {each.rows} x {each.kind}"
        if each.setting != first.setting:
            problem = (
                f"ranks {first_rank} and {rank} have different loss plans or languages; expected "
                "the same on all"
            )
        elif each.other:
            problem = (
                f"{own} for {names[0]} and {each.other_rows} x {each.other_kind} for "
                f"{names[each.other]}; expected the same for both"
            )
        elif not each.kind.comparable:
            problem = f"{own}; expected floating-point features of shape (samples, dim)"
        elif each.kind != first.kind:
            problem = (
                f"{own} and rank {first_rank} {first.rows} x {first.kind}; expected the same "
                "width, dtype and device"
            )
        elif each.gradients != first.gradients:
            problem = (
                f"ranks {first_rank} and {rank} need gradients for different features; expected "
                "the same frozen towers"
            )
        elif not each.finite:
            problem = f"rank {rank} has features that are not finite; expected finite ones"
        else:
            continue
        raise DistributedError(problem)
    rows = [each.rows for each in declared.values()]
    if plan.even and len(set(rows)) > 1:
        raise DistributedError(
            f"the ranks of a loss group have {', '.join(map(str, rows))} samples; expected equal "
            "numbers, or even=False in the loss plan"
        )
