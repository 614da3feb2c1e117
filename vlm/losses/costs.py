"""What a contrastive loss costs a rank, by formula: products, memory, and what it sends.

docs/grouped_loss.md explains the formulas; `benchmarks/loss_scaling.py` and a test hold them
against what real processes do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlm.losses.plan import LossConfig, LossPlan, dtype_named

FLOAT, INTEGER = 4, 8
"""Bytes of a float32 and of an int64."""

_DECLARED = 28  # integers that a rank declares of its features
_FEW_RANKS = 4  # up to here an axis merges its statistics by one all-gather

Mesh = tuple[int, int]
"""Rows and columns of a loss group's ranks."""


class Message(NamedTuple):
    """A collective, and the bytes that a rank sends in it by a bandwidth-optimal algorithm."""

    kind: str
    sent: int


@dataclass(frozen=True)
class Sizes:
    """The sizes of a step in the space of one head."""

    world: int
    """Ranks."""
    rows: int
    """Samples a rank."""
    dim: int

    @property
    def features(self) -> int:
        """Numbers in one side's features of one rank."""
        return self.rows * self.dim


@dataclass(frozen=True)
class StepCost:
    """What contrasting one head's features costs a rank in a step, forward and backward."""

    flops: int
    """Of matrix products."""
    held: int
    """Bytes of gathered features, their gradients, kept logits and tiles."""
    sent: int
    """Bytes."""
    collectives: int


def step_cost(
    config: LossConfig, batch: Sizes, mesh: Mesh, *, texts: int, device: str = "cuda"
) -> StepCost:
    """Return the cost of a training step's loss on features of float32.

    Args:
        config: The loss.
        batch: The sizes of the step, where every sample has a caption in every language.
        mesh: The loss group's.
        texts: Captions of a sample, over its languages and second captions.
        device: Its type, by which the tiles are chosen.
    """
    plan, (rows, columns) = config.plan, mesh
    together, pair = config.captions == "together", bool(config.text_text_weight)
    # Images and texts of each term, as numbers of one side's samples.
    terms = ([(1, texts)] if together else [(1, 1)] * texts) + [(1, 1)] * pair
    group = rows * columns
    flops = kept = 0
    for of_rows, of_columns in terms:
        block = of_rows * of_columns * group * batch.rows**2
        logits = 0 if plan.kind == "sigmoid" else int(min(block * FLOAT, plan.kept_bytes))
        again = plan.kind == "softmax" and logits < block * FLOAT
        flops += (3 + again) * 2 * block * batch.dim
        kept += logits
    tile_rows, tile_columns = plan.tile_shape(device)
    largest = min(group * batch.rows**2 * (texts if together else 1), tile_rows * tile_columns)
    sides = columns * (1 + pair) + rows * (texts + (pair and together))
    messages = list(step_messages(config, batch, mesh, texts=texts))
    return StepCost(
        flops=flops,
        held=2 * sides * batch.features * FLOAT
        + kept
        + (3 if plan.kind == "sigmoid" else 2) * largest * FLOAT,
        sent=sum(each.sent for each in messages),
        collectives=len(messages),
    )


def step_messages(config: LossConfig, batch: Sizes, mesh: Mesh, *, texts: int) -> Iterator[Message]:
    """Give the collectives of a training step's loss on one head's features of float32."""
    plan, (rows, columns) = config.plan, mesh
    together, pair = config.captions == "together", bool(config.text_text_weight)
    yield from [*declaration(plan, batch, mesh)] * 2  # with the texts, and with the images
    # Texts travel along columns, of as many ranks as the mesh has rows; images along rows.
    for ranks, sides in (
        (rows, [texts] if together else [1] * texts),
        (columns, [1]),
        (columns, [1] * pair),
        (rows, [1] * (pair and together)),
    ):
        for per_sample in sides:
            yield from travel(plan, ranks, batch.features * per_sample)
    ids = 2 + texts  # of the sample, the image, and each caption
    yield from gather(columns, batch.rows * ids * INTEGER)
    yield from gather(rows, batch.rows * ids * INTEGER)
    if together:  # and of each caption on its own
        yield from gather(rows, batch.rows * 3 * texts * INTEGER)
    terms = ([(1, texts)] if together else [(1, 1)] * texts) + [(1, 1)] * pair
    maxima, sums = statistics_kept(plan, ids=True)
    for of_rows, of_columns in terms:
        yield from merges(columns, batch.rows * of_rows, maxima, sums)
        yield from merges(rows, batch.rows * of_columns, maxima, sums)


def declaration(plan: LossPlan, batch: Sizes, mesh: Mesh) -> Iterator[Message]:
    """Give the message in which ranks declare what they bring."""
    declarers = mesh[0] * mesh[1] if plan.even else batch.world
    yield from gather(declarers, _DECLARED * INTEGER)


def travel(plan: LossPlan, ranks: int, features: int) -> Iterator[Message]:
    """Give the messages of features that go to `ranks` ranks, and of gradients that come back."""
    wire, gradient_wire = (
        dtype_named(name).itemsize if name else FLOAT
        for name in (plan.wire_dtype, plan.gradient_wire_dtype)
    )
    yield from gather(ranks, features * wire)
    if ranks > 1:
        yield Message("reduce-scatter", (ranks - 1) * features * gradient_wire)


def gather(ranks: int, size: int) -> Iterator[Message]:
    """Give the message in which each of `ranks` ranks sends `size` bytes to the others, if any."""
    if ranks > 1:
        yield Message("all-gather", (ranks - 1) * size)


def statistics_kept(plan: LossPlan, *, ids: bool) -> tuple[int, int]:
    """Return how many maxima and how many sums are known of each sample."""
    sums = 1 + bool(plan.label_smoothing)
    return (2, sums + 2 + (plan.duplicates == "ignore")) if ids else (1, sums)


def merges(ranks: int, rows: int, maxima: int, sums: int) -> Iterator[Message]:
    """Give the messages that merge statistics along one axis of the mesh."""
    if ranks <= _FEW_RANKS:
        yield from gather(ranks, ranks * rows * (maxima + sums) * FLOAT)
    else:
        for values in (maxima, sums):
            yield Message("all-reduce", 2 * (ranks - 1) * rows * values * FLOAT)


def head_widths(embed_dim: int, matryoshka: Sequence[int], *, unimodal: bool) -> list[int]:
    """Return the width of every head whose features are contrasted."""
    return [embed_dim, *matryoshka, *[embed_dim] * unimodal]
