"""A model's passes over tensors without contents, as a run makes them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from vlm.batches.batch import Batch
from vlm.batches.collate import draw_patches
from vlm.batches.examples import second_of
from vlm.bundle import Bundle
from vlm.models.encoder import Encoder
from vlm.models.masked import Hidden
from vlm.models.pretraining import PretrainingModel
from vlm.text.tokenizer import TokenBatch
from vlm.training.config import TrainConfig
from vlm.training.objectives import mask_plan
from vlm.training.planning.hollow import HollowTensors, Pass, run_pass


def count_flops(
    config: TrainConfig, model: PretrainingModel, batch: Batch, *, mode: HollowTensors
) -> int:
    """Return the FLOP of a model without contents on a batch, forward and backward.

    Nothing is computed twice in it, and the loss is not counted.
    """
    with kept_activations(model.encoder):
        return model_pass(config, model, mode, batch).flops


def teacher_flops(
    config: TrainConfig, teacher: Bundle | None, mode: HollowTensors, batch: Batch
) -> int:
    """Return what a teacher computes of a batch."""
    mode.flops = 0
    if teacher is not None:
        with mode, torch.no_grad(), _autocast(config):
            teacher.model.encode_image(torch.empty(batch.images.shape))
            for tokens in batch.texts.values():
                teacher.model.encode_text(tokens)
    return mode.flops


def model_pass(
    config: TrainConfig,
    model: PretrainingModel,
    mode: HollowTensors,
    batch: Batch,
    *,
    no_sync: Callable[[], AbstractContextManager[None]] | None = None,
) -> Pass:
    """Return what a forward and a backward pass over a batch take, without the loss."""
    return run_pass(model, lambda: _scalar(config, model, batch), mode=mode, no_sync=no_sync)


def saved_by_all_blocks(
    config: TrainConfig, model: PretrainingModel, mode: HollowTensors, batch: Batch
) -> int:
    """Return the bytes saved by a forward pass without activation checkpointing."""
    mode.count_anew()
    with kept_activations(model.encoder), mode:
        graph = _scalar(config, model, batch)
        saved = mode.alive
    del graph
    return saved


@contextmanager
def kept_activations(encoder: Encoder) -> Iterator[None]:
    """Let blocks that are computed again keep their activations, in a `with` block."""
    forwards = [(block, block.__dict__.pop("forward", None)) for block in encoder.blocks()]
    try:
        yield
    finally:
        for block, forward in forwards:
            if forward is not None:
                block.forward = forward


def longest_batch(
    config: TrainConfig, model: PretrainingModel, *, rows: int, side: int, length: int
) -> Batch:
    """Return a micro-batch whose every sample has captions of the longest kind.

    Args:
        config: The run.
        model: What it trains.
        rows: Samples.
        side: Of the images, in pixels.
        length: Of the captions, in tokens.
    """
    masks = mask_plan(config.objectives.masked, model.encoder)
    languages = config.captions.languages
    names = [*languages, *map(second_of, languages)] if config.captions.second else [*languages]
    own = torch.arange(rows)
    tokens = TokenBatch(torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length) > 0)
    hidden = (torch.arange(length) < masks.text_ratio * length).expand(rows, -1)
    return Batch(
        images=torch.empty(rows, 3, side, side, device="meta"),
        texts=dict.fromkeys(names, tokens),
        text_rows=dict.fromkeys(names, own),
        image_ids=own,
        caption_ids=dict.fromkeys(names, own),
        uids=tuple(map(str, range(rows))),
        hidden_words=dict.fromkeys(languages, hidden) if masks.text_ratio else {},
        hidden_patches=draw_patches(
            rows, masks.grid, ratio=masks.image_ratio, generator=torch.Generator()
        )
        if masks.image_ratio
        else None,
    )


def with_images(batch: Batch | None, side: int) -> Batch | None:
    """Return samples, if there are any, with images of another size and without contents."""
    if batch is None:
        return None
    return replace(batch, images=torch.empty(len(batch.uids), 3, side, side, device="meta"))


def _scalar(config: TrainConfig, model: PretrainingModel, batch: Batch) -> Tensor:
    """Return a number whose gradient reaches all that the loss's does."""
    images = torch.empty(batch.images.shape)  # hollow, inside the mode
    hidden = Hidden(batch.text_rows, batch.hidden_words, batch.hidden_patches)
    with _autocast(config):
        encoded = model(images, batch.texts, hidden)
    total: Tensor = torch.zeros(())
    for head in encoded.heads.values():
        assert head.image is not None
        total = total + head.image.sum() + head.logit_scale
        total = total + sum(text.sum() for text in head.text.values())
        total = total if head.logit_bias is None else total + head.logit_bias
    for other in encoded.others.values():
        total = total + other
    return total


def _autocast(config: TrainConfig) -> torch.autocast:
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast("cpu", dtype, enabled=config.precision != "fp32")
