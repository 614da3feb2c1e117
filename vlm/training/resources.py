"""What a run takes of each device and of the network, found without weights or other processes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.batches.batch import Batch
from vlm.batches.collate import MaskPlan, draw_patches
from vlm.batches.examples import second_of
from vlm.bundle import Bundle
from vlm.errors import ConfigError
from vlm.losses.costs import Mesh, Sizes, StepCost, head_widths, step_cost
from vlm.models.encoder import UNIMODAL, Encoder
from vlm.models.masked import Hidden
from vlm.models.pretraining import PretrainingModel
from vlm.text.tokenizer import TokenBatch
from vlm.training.config import ClusterConfig, TrainConfig
from vlm.training.hollow import HollowTensors, Pass, make_hollow, optimizer_bytes, run_pass
from vlm.training.objectives import Teacher, mask_plan
from vlm.training.optimizer import build_optimizer

_SMALL = 1 << 16  # bytes of a state that is not worth a line, such as counts of steps


@dataclass(frozen=True)
class Resources:
    """What training a model takes, at the longest texts that it reads."""

    parameters: Mapping[str, int]
    """Their number by part; towers may share some."""
    memory: Mapping[str, int]
    """Bytes on each device, by what takes them, and the peak of them all."""
    flops: int
    """Of one sample, forward and backward, without anything computed twice."""
    sent: Mapping[str, int]
    """Bytes that a rank sends in a step, by what for."""
    checkpoint: int
    """Bytes of one checkpoint."""
    bundle: int
    """Bytes of a bundle's weights."""


def resources_of(
    config: TrainConfig,
    cluster: ClusterConfig,
    model: PretrainingModel,
    *,
    image_size: int,
    context_length: int,
    mesh: Mesh,
    batch: Batch | None,
    teacher: Bundle | None = None,
) -> Resources:
    """Run passes of a model over tensors without contents, and return what training it takes.

    Args:
        config: The run.
        cluster: Where it is to run.
        model: What it trains; its weights are dropped.
        image_size: Side of its images.
        context_length: Of the tokenizer; memory must hold texts of that length.
        mesh: The loss group's.
        batch: Samples of the data, whose texts are of natural length; None for the longest.
        teacher: Of the distillation, if there is one.
    """
    mode = HollowTensors()
    make_hollow(model, mode)
    rows = -(-max(config.batch_sizes) // (cluster.ranks * config.loss.micro_batches))
    masks = mask_plan(config.objectives.masked, model.encoder)
    longest = _longest(config, rows, image_size, context_length, masks)
    step = _pass(config, model, mode, longest)
    with _kept_activations(model.encoder):
        recomputes = config.adapt.grad_checkpointing != "none"
        kept = _saved(config, model, mode, longest) if recomputes else step.saved
        read = _pass(config, model, mode, batch or longest)
    states = optimizer_bytes(build_optimizer(model, config.optimizer), model, mode=mode)
    weights = _bytes(model.parameters())
    trained = _bytes(each for each in model.parameters() if each.requires_grad)
    frozen = [teacher.model] if teacher else []
    frozen += [model.teacher.model] if isinstance(model.teacher, Teacher) else []
    teachers = {"teachers": sum(_bytes(each.parameters()) for each in frozen)} if frozen else {}
    average = {"moving average": weights} if config.averaging.ema_decay is not None else {}
    loss = _loss_cost(config, cluster, model, mesh)
    memory = {
        "weights": weights + _bytes(model.buffers()),
        **average,
        **teachers,
        **{f"optimizer {kind}": size for kind, size in states.items() if size > _SMALL},
    }
    peak = sum(memory.values()) + _most(config, cluster, step, loss.held, trained)
    memory |= {
        "gradients": trained * (1 + (cluster.ranks > 1)),
        "activations": step.saved,
        "activations without recomputation": kept,
        "loss": loss.held,
        "peak": peak,
    }
    return Resources(
        parameters=_parameters(model),
        memory=memory,
        flops=(read.flops + _teacher_flops(config, teacher, mode, batch or longest))
        // len((batch or longest).uids)
        + loss.flops,
        sent={
            "loss": loss.sent,
            "gradients": 2 * (cluster.ranks - 1) * trained // cluster.ranks,
        },
        checkpoint=weights + sum(average.values()) + sum(states.values()),
        bundle=_bytes(model.encoder.parameters()),
    )


def _teacher_flops(
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


def _most(config: TrainConfig, cluster: ClusterConfig, step: Pass, loss: int, trained: int) -> int:
    """Return the most bytes that a step adds to what is there between steps."""
    buckets = trained if cluster.ranks > 1 else 0  # in which DDP averages gradients
    in_parts = config.loss.micro_batches > 1
    # Gradients of earlier micro-batches are there all the time.
    before = buckets + (trained if in_parts else 0)
    within = max(step.saved + loss, step.peak(ratio=0.0 if in_parts else 1.0))
    return max(before + within, trained + buckets)


def _loss_cost(
    config: TrainConfig, cluster: ClusterConfig, model: PretrainingModel, mesh: Mesh
) -> StepCost:
    """Return what the loss of all heads costs a rank in a step; its FLOP are of a sample."""
    local, parts = max(config.batch_sizes) // cluster.ranks, 1
    if config.loss.accumulation == "one_pass":
        parts = config.loss.micro_batches
    widths = head_widths(
        model.encoder.embed_dim,
        config.objectives.matryoshka,
        unimodal=model.unimodal and UNIMODAL in model.encoder.logit_scales,
    )
    texts = len(config.captions.languages) * (1 + config.captions.second)
    here = cluster.world is None and not torch.accelerator.is_available()
    device = "cpu" if here else "cuda"  # whose tiles are larger
    sizes = [Sizes(cluster.ranks, -(-local // parts), width) for width in widths]
    heads = [step_cost(config.loss, each, mesh, texts=texts, device=device) for each in sizes]
    return StepCost(
        flops=sum(each.flops for each in heads) // sizes[0].rows,
        held=sum(each.held for each in heads),
        sent=sum(each.sent for each in heads) * parts,
        collectives=sum(each.collectives for each in heads) * parts,
    )


def count_flops(
    config: TrainConfig, model: PretrainingModel, batch: Batch, *, mode: HollowTensors
) -> int:
    """Return the FLOP of a model without contents on a batch, forward and backward.

    Nothing is computed twice in it, and the loss is not counted.
    """
    with _kept_activations(model.encoder):
        return _pass(config, model, mode, batch).flops


@contextmanager
def _kept_activations(encoder: Encoder) -> Iterator[None]:
    """Let blocks that are computed again keep their activations, in a `with` block."""
    forwards = [(block, block.__dict__.pop("forward", None)) for block in encoder.blocks()]
    try:
        yield
    finally:
        for block, forward in forwards:
            if forward is not None:
                block.forward = forward


def _parameters(model: PretrainingModel) -> dict[str, int]:
    """Count parameters by part; a part that both towers share counts in each."""
    encoder = model.encoder
    try:
        towers = {
            "image tower": {each for group in encoder.image_groups() for each in group},
            "text tower": {each for group in encoder.text_groups() for each in group},
        }
    except ConfigError:  # a tower that cannot be divided
        towers = {"towers": set(encoder.parameters())}
    of_training = set(model.parameters()) - set(encoder.parameters())
    trained = {each for each in model.parameters() if each.requires_grad}
    parts = towers | {"only for training": of_training} | {"all": set(model.parameters())}
    shared = set.intersection(*towers.values()) if len(towers) > 1 else set()
    parts |= {"shared by the towers": shared} if shared else {}
    return {name: _count(part) for name, part in (parts | {"trained": trained}).items()}


def _count(parameters: set[nn.Parameter]) -> int:
    return sum(each.numel() for each in parameters)


def _bytes(tensors: Iterator[nn.Parameter] | Iterator[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _longest(
    config: TrainConfig, rows: int, image_size: int, length: int, masks: MaskPlan
) -> Batch:
    """Return a micro-batch whose every sample has captions of the longest kind."""
    languages = config.captions.languages
    names = [*languages, *map(second_of, languages)] if config.captions.second else [*languages]
    own = torch.arange(rows)
    tokens = TokenBatch(torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length) > 0)
    hidden = (torch.arange(length) < masks.text_ratio * length).expand(rows, -1)
    return Batch(
        images=torch.empty(rows, 3, image_size, image_size, device="meta"),
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


def _pass(config: TrainConfig, model: PretrainingModel, mode: HollowTensors, batch: Batch) -> Pass:
    return run_pass(model, lambda: _scalar(config, model, batch), mode=mode)


def _saved(config: TrainConfig, model: PretrainingModel, mode: HollowTensors, batch: Batch) -> int:
    """Return the bytes that a forward pass leaves for the backward one."""
    mode.log.clear()
    with mode:
        result = _scalar(config, model, batch)
        saved = sum(size for _, size in mode.log)
    del result
    return saved


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
    return torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")
