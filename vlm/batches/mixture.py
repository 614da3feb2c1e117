"""Which samples each rank reads of several sources: a pure function of a plan and a few integers.

The samples of a source are read by canonical streams, whose number a run keeps whatever its ranks
are later; a batch takes its part of every stream, and from every source what its weight asks for.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm.batches.config import DataConfig
from vlm.batches.order import SampleKey, SourceOrder, permutation
from vlm.errors import ConfigError

_ROUNDING = 1e-9  # of sums of shares, in samples


class DataState:
    """How far the data of a run has been read, for any number of ranks and workers.

    It is kept by the sources' names, so that a mixture may change: a source that joins begins at
    its start with the shares since then.
    """

    def __init__(self, names: Sequence[str], streams: int) -> None:
        self.names = tuple(names)
        self.batch = 0
        """Batches that are behind, skipped ones included."""
        self.taken: NDArray[np.int64] = np.zeros((len(names), streams), np.int64)
        """Samples taken of each source by each stream."""
        self.lag: NDArray[np.float64] = np.zeros(len(names))
        """By source, its shares of all batches less the samples taken of it."""

    @property
    def streams(self) -> int:
        """The number of streams, which a run keeps."""
        return int(self.taken.shape[1])

    def copy(self) -> "DataState":
        """Return a state that goes its own way."""
        copy = DataState(self.names, self.streams)
        copy.load_state_dict(self.state_dict())
        return copy

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "batch": self.batch,
            "streams": self.streams,
            "taken": dict(zip(self.names, self.taken.tolist(), strict=True)),
            "lag": dict(zip(self.names, self.lag.tolist(), strict=True)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the numbers; what is there of sources that are no longer read is dropped."""
        self.batch = state["batch"]
        new = [0] * state["streams"]
        self.taken = np.array([state["taken"].get(name, new) for name in self.names], np.int64)
        self.lag = np.array([state["lag"].get(name, 0.0) for name in self.names])


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which share of each batch comes from which source, and which batches are left out."""

    phases: Sequence[tuple[int | None, Sequence[float]]]
    """The weight of each source, before which batch; the last is without an end, None."""
    by_source: bool = False
    """Whether a batch comes from one source alone; shares then hold over many batches."""
    skipped: Sequence[tuple[int, int]] = ()
    """First and last numbers of batches whose samples are passed over."""

    def shares(self, batch: int) -> NDArray[np.float64]:
        """Return the sources' shares of a batch, which add up to 1."""
        weights = next(each for end, each in self.phases if end is None or batch < end)
        total = sum(weights)
        return np.array([weight / total for weight in weights])

    def skips(self, batch: int) -> bool:
        """Say whether a batch is passed over."""
        return any(first <= batch <= last for first, last in self.skipped)


def mixture_of(
    data: DataConfig,
    sizes: Mapping[str, int],
    stages: Sequence[tuple[int, Mapping[str, float] | None]] = (),
) -> Mixture:
    """Return the mixture that the settings ask for.

    Args:
        data: The settings.
        sizes: The number of samples in each source, by name.
        stages: For each stage of a run the step that it ends before, and weights of the sources by
            name, where it has its own.
    """
    given = [source.weight for source in data.mixed] or [None]
    own = {name: weight or size for (name, size), weight in zip(sizes.items(), given, strict=True)}
    phases = [(phase.until, phase.weights) for phase in data.mixture.schedule]
    if any(weights for _, weights in stages):
        ends = [batch_at(end, data.skip_batches) for end, _ in stages[:-1]]
        weighted = [weights or own for _, weights in stages]
        phases = list(zip([*ends, None], weighted, strict=True))
    return Mixture(
        phases=[
            (end, [float(weights.get(name, 0.0)) for name in sizes])
            for end, weights in phases or [(None, own)]
        ],
        by_source=data.mixture.batch_by == "source",
        skipped=data.skip_batches,
    )


def value_at(batch: int, changes: Sequence[tuple[int, int]], first: int) -> int:
    """Return what holds at a batch, of what changes from some batches on, ascending."""
    return next((value for start, value in reversed(changes) if start <= batch), first)


def batch_at(step: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Return the number of the batch that a step reads, where some are passed over."""
    batch, behind = step, 0
    for first, last in sorted(skipped):
        if first <= batch and last >= behind:
            batch += last + 1 - max(first, behind)  # ranges may overlap
            behind = last + 1
    return batch


class _Draw(NamedTuple):
    """What one batch takes of each source and stream."""

    batch: int
    firsts: NDArray[np.int64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class BatchOrder:
    """Which samples one rank reads, batch by batch.

    Batch `k` is a function of the plan and the state alone. Its samples lie stream by stream; of
    these slots rank `r` of `n` reads the `r`-th part. So nothing depends on `n`, and where there
    are as many streams as nodes, a node reads its own.

    Args:
        sources: With the same number of streams.
        mixture: Their weights.
        batch_size: Samples that all ranks together read in one step.
        changes: Batches from which on it is another number, ascending, and that number.

    Raises:
        ConfigError: a batch is no multiple of the ranks or of the streams, or larger than a
            source.
    """

    sources: Sequence[SourceOrder]
    mixture: Mixture
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    changes: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        sizes = [self.batch_size, *(size for _, size in self.changes)]
        for number, what in ((self.world_size, "processes"), (self.streams, "streams of data")):
            for size in sizes:
                if size < 1 or size % number:
                    raise ConfigError(
                        f"the batch has {size} samples; expected a multiple of {number}, the "
                        f"number of {what}"
                    )
        for end, weights in self.mixture.phases:
            for source, weight in zip(self.sources, weights, strict=True):
                share = 1.0 if self.mixture.by_source and weight else weight / sum(weights)
                most = int(np.ceil(share * max(sizes)))
                if most > source.size:
                    raise ConfigError(
                        f"a batch takes {most} samples of the source {source.name!r}"
                        f"{'' if end is None else f' up to step {end}'}, which has {source.size}; "
                        "expected a smaller batch or weight"
                    )

    @property
    def streams(self) -> int:
        """The number of streams."""
        return self.sources[0].streams

    @property
    def samples(self) -> int:
        """The number of samples of all sources."""
        return sum(source.size for source in self.sources)

    def size_at(self, batch: int) -> int:
        """Return the number of samples of a batch."""
        return value_at(batch, self.changes, self.batch_size)

    def with_streams(self, streams: int) -> "BatchOrder":
        """Return the same plan over another number of streams: another order."""
        return replace(self, sources=[replace(each, streams=streams) for each in self.sources])

    def start(self) -> DataState:
        """Return the state before the first batch."""
        return DataState([source.name for source in self.sources], self.streams)

    def advance(self, state: DataState) -> _Draw:
        """Move a state past the next batch that is not skipped, and return what that takes."""
        while True:
            batch, firsts = state.batch, state.taken.copy()
            shares = self.mixture.shares(batch)
            counts = self._counts(state.lag, batch)
            state.lag += shares * self.size_at(batch) - counts.sum(1)
            state.taken = firsts + counts
            state.batch += 1
            if not self.mixture.skips(batch):
                return _Draw(batch, firsts, counts)

    def batches(self, state: DataState, number: int) -> Iterator[list[SampleKey]]:
        """Give this rank's part of the next `number` batches; the state stays as it is."""
        return (keys for _, keys in self.numbered_batches(state, number))

    def numbered_batches(
        self, state: DataState, number: int
    ) -> Iterator[tuple[int, list[SampleKey]]]:
        """Give the same, each with the batch's own number."""
        state = state.copy()  # workers read ahead of training
        for _ in range(number):
            draw = self.advance(state)
            yield draw.batch, self._own(draw)

    def _own(self, draw: _Draw) -> list[SampleKey]:
        """Return this rank's part of a batch."""
        size = self.size_at(draw.batch)
        local, of_stream = size // self.world_size, size // self.streams
        first, last = self.rank * local, (self.rank + 1) * local
        keys: list[SampleKey] = []
        for stream in range(first // of_stream, -(-last // of_stream)):
            slots = self._slots(draw, stream)
            start = stream * of_stream
            keys += slots[max(first - start, 0) : last - start]
        return keys

    def _slots(self, draw: _Draw, stream: int) -> list[SampleKey]:
        """Return a stream's samples in a random order, so that every part of it is mixed."""
        keys = [
            key
            for number, source in enumerate(self.sources)
            for key in source.read(
                number, stream, int(draw.firsts[number, stream]), int(draw.counts[number, stream])
            )
        ]
        return [keys[i] for i in permutation(len(keys), self.seed, draw.batch, stream)]

    def _counts(self, lag: NDArray[np.float64], batch: int) -> NDArray[np.int64]:
        """Return how many samples each stream takes of each source.

        Stream by stream each source gets the whole samples that it lacks, and those that would lack
        another one first get one more. The earliest deadline first keeps every source within one
        sample of its shares (Steiner and Yeomans 1993), also where the shares change, since
        deadlines are those of the schedule to come (Tijdeman 1980).
        """
        size = self.size_at(batch) // self.streams
        shares = self.mixture.shares(batch)
        counts = np.zeros((len(self.sources), self.streams), np.int64)
        if self.mixture.by_source or len(self.sources) == 1:
            counts[np.argmax(lag + shares * self.size_at(batch))] = size
            return counts
        for stream in range(self.streams):
            lag = lag + shares * size
            whole = np.floor(np.maximum(lag, 0.0) + _ROUNDING).astype(np.int64)
            ahead = lag < whole + _ROUNDING
            now = self._samples_before(batch) + (stream + 1) * size
            due = self._due(whole + 1 - lag, now)
            whole[np.lexsort((due, ahead))[: size - whole.sum()]] += 1
            counts[:, stream] = whole
            lag = lag - whole
        return counts

    def _due(self, needs: NDArray[np.float64], now: int) -> NDArray[np.float64]:
        """Return after how many more samples of all each source's share of them is its need."""
        due, passed = np.full(len(needs), np.inf), 0.0
        for end, weights in self.mixture.phases:
            length = np.inf
            if end is not None:
                length = max(self._samples_before(end) - now - passed, 0.0)
            if length:
                shares = np.array(weights) / sum(weights)
                with np.errstate(divide="ignore", invalid="ignore"):  # a share of 0 never needs one
                    after = needs / shares
                    needs = needs - shares * length
                due = np.where(np.isinf(due) & (after <= length), passed + after, due)
                passed += length
        return due

    def _samples_before(self, batch: int) -> int:
        """Return the number of samples of all batches before one, skipped ones included."""
        total, start, size = 0, 0, self.batch_size
        for first, changed in self.changes:
            if first < batch:
                total, start, size = total + (first - start) * size, first, changed
        return total + (batch - start) * size
