"""Training batches in an order fixed by a seed and a state, whatever the number of processes."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vlm.batches.batch import Batch
from vlm.batches.collate import MaskPlan, collate
from vlm.batches.examples import Example, TrainingExamples
from vlm.batches.mixture import BatchOrder, DataState, value_at
from vlm.batches.order import SampleKey
from vlm.batches.workers import batches_of, start_worker
from vlm.errors import VlmError
from vlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Answers(Dataset[Example | VlmError]):
    """Examples, or what is wrong: torch makes a page of the error that a worker raises."""

    examples: TrainingExamples

    def __getitem__(self, request: tuple[SampleKey, int]) -> Example | VlmError:
        try:
            return self.examples.sized(*request)
        except VlmError as error:
            return error


def _collate(answers: Sequence[Example | VlmError], **settings: Any) -> Batch | VlmError:
    examples = [answer for answer in answers if isinstance(answer, Example)]
    if len(examples) == len(answers):
        return collate(examples, **settings)
    return next(answer for answer in answers if isinstance(answer, VlmError))


@dataclass(frozen=True)
class TrainingLoader:
    """Gives one rank's batches from any state of the data on."""

    examples: TrainingExamples
    order: BatchOrder
    tokenizer: Tokenizer
    workers: int
    """Processes that decode and augment; 0 does it in this process."""
    masks: MaskPlan | None = None
    """What masked modelling hides."""
    stall_s: float = 60.0
    """Seconds without a sign of life of a worker that are taken for its end."""
    image_sizes: Sequence[tuple[int, int]] = ()
    """Batches from which on images have another size, ascending, and that size in pixels."""

    def with_streams(self, streams: int) -> "TrainingLoader":
        """Return the same loader over another number of streams: another order."""
        order = self.order.with_streams(streams)
        return replace(self, order=order, examples=replace(self.examples, orders=order.sources))

    def read(
        self, state: DataState, batches: int, *, until: Callable[[], bool] | None = None
    ) -> Generator[Batch]:
        """Give the next batches after a state, which stays as it is.

        Args:
            state: Where to begin.
            batches: How many to give.
            until: Asked while a batch is missing; once it is true, no more are given.

        Raises:
            DataError: a worker has ended, or shows no sign of life for `stall_s`.
            VlmError: a sample cannot be used, nor another one in its place.
        """
        loader: DataLoader[Example | VlmError] = DataLoader(
            _Answers(self.examples),
            batch_sampler=self._announced(self.order.numbered_batches(state, batches)),
            num_workers=self.workers,
            collate_fn=partial(_collate, tokenizer=self.tokenizer, masks=self.masks),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
        )
        return batches_of(loader, stall_s=self.stall_s, until=until)

    def _announced(
        self, batches: Iterator[tuple[int, list[SampleKey]]]
    ) -> Iterator[list[tuple[SampleKey, int]]]:
        """Pass keys on, and start to fetch their shards before the workers ask for them."""
        for number, keys in batches:
            self.examples.prefetch(keys)
            size = value_at(number, self.image_sizes, self.examples.transform.image_size)
            yield [(key, size) for key in keys]
