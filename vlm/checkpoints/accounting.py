"""Every tensor accounted for: which of theirs makes which of ours, and what is left over."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.checkpoints.reading import Tensors
from vlm.errors import CheckpointError

_SHOWN = 3  # names of each kind in an error


@dataclass(frozen=True)
class Origin:
    """Where one of our tensors comes from in another project's file."""

    names: tuple[str, ...]
    """Their tensors, which ours has below each other; one, or query, key and value."""
    transposed: bool = False
    """Whether theirs has rows and columns exchanged."""


OriginOf = Callable[[str], Origin]
"""The origin of one of our tensors, by its name."""


def to_ours(
    theirs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    origin_of: OriginOf,
    *,
    allowed: Sequence[str] = (),
) -> tuple[Tensors, list[str]]:
    """Make our tensors of theirs.

    `expected` has tensors of the right shapes by our names; `allowed` has patterns of whole names
    that may be there and are dropped on purpose.

    Returns:
        Our tensors by name, and the names that were dropped.
    """
    origins = {name: origin_of(name) for name in expected}
    used = {name for origin in origins.values() for name in origin.names}
    left = sorted(theirs.keys() - used)
    dropped = [name for name in left if any(re.fullmatch(each, name) for each in allowed)]
    missing = sorted(used - theirs.keys())
    ours, misshaped = {}, []
    for name, origin in origins.items():
        if not all(each in theirs for each in origin.names):
            continue
        tensor = _joined([theirs[each] for each in origin.names], origin)
        if tensor is None or tensor.shape != expected[name].shape:
            found = "/".join(str(list(theirs[each].shape)) for each in origin.names)
            wanted = list(expected[name].shape)
            misshaped.append(f"{', '.join(origin.names)} is {found}, as {name} {wanted}")
        else:
            ours[name] = tensor
    unexpected = sorted(set(left) - set(dropped))
    _complain({"missing": missing, "unexpected": unexpected, "of another shape": misshaped})
    return ours, dropped


def to_theirs(ours: Mapping[str, Tensor], origin_of: OriginOf) -> Tensors:
    """Make their tensors of ours: what `to_ours` undoes."""
    theirs = {}
    for name, tensor in ours.items():
        origin = origin_of(name)
        parts = tensor.chunk(len(origin.names)) if len(origin.names) > 1 else (tensor,)
        for each, part in zip(origin.names, parts, strict=True):
            theirs[each] = (part.T if origin.transposed else part).contiguous()
    return theirs


def _joined(parts: Sequence[Tensor], origin: Origin) -> Tensor | None:
    """Return the parts as one tensor, or None where they do not fit each other."""
    if origin.transposed and parts[0].ndim != 2:
        return None
    if len(parts) == 1:
        return parts[0].T if origin.transposed else parts[0]
    if len({part.shape for part in parts}) > 1 or parts[0].ndim == 0:
        return None
    return torch.cat(list(parts))


def _complain(wrong: Mapping[str, Iterable[str]]) -> None:
    """Raise an error with the first few names of each kind."""
    problems = []
    for kind, names in wrong.items():
        found = list(names)
        if found:
            more = ", ..." if len(found) > _SHOWN else ""
            problems.append(f"{len(found)} {kind} ({'; '.join(found[:_SHOWN])}{more})")
    if problems:
        raise CheckpointError(f"the tensors do not fit the model: {', '.join(problems)}")
