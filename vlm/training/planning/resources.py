"""What a run takes of each device and of the network, found without weights or other processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlm.batches.batch import Batch
from vlm.bundle import Bundle
from vlm.distributed.imagined import imagined_world
from vlm.distributed.sharding import ShardedModel, Sharding, launched_sharding, local
from vlm.errors import ConfigError
from vlm.losses.costs import FLOAT, Mesh, Sizes, StepCost, head_widths, step_cost
from vlm.models.batch_norm import has_statistics
from vlm.models.encoder import UNIMODAL
from vlm.models.pretraining import PretrainingModel
from vlm.training.config import ClusterConfig, TrainConfig
from vlm.training.objectives import Teacher
from vlm.training.optimization.optimizer import build_optimizer
from vlm.training.planning.hollow import HollowTensors, Pass, make_hollow, optimizer_bytes
from vlm.training.planning.passes import (
    count_flops,
    kept_activations,
    longest_batch,
    model_pass,
    teacher_flops,
    with_images,
)
from vlm.training.precision import Precision

_SMALL = 1 << 16  # bytes of a state that is not worth a line, such as counts of steps


@dataclass(frozen=True)
class StepResources:
    """What a step takes, at the longest texts that the model reads."""

    memory: Mapping[str, int]
    """Bytes on each device, by what takes them, and the peak of them all."""
    flops: int
    """Of one sample, forward and backward, without anything computed twice."""
    sent: Mapping[str, int]
    """Bytes that a rank sends, by what for."""


@dataclass(frozen=True)
class Resources:
    """What training a model takes."""

    parameters: Mapping[str, int]
    """Their number by part; towers may share some."""
    stages: Sequence[StepResources]
    """A step of each stage, at its sizes of the batch and of images."""
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
        image_size: Side of its images, where a stage has no size of its own.
        context_length: Of the tokenizer; memory must hold texts of that length.
        mesh: The loss group's.
        batch: Samples of the data, whose texts are of natural length; None for the longest.
        teacher: Of the distillation, if there is one.
    """
    mode, sharding = HollowTensors(), sharding_of(cluster)
    make_hollow(model, mode)
    parameters, bundle = _parameters(model), _bytes(model.encoder.parameters())
    weights, trained = _bytes(model.parameters()), _bytes(_trained(model))  # undivided
    parts = config.loss.micro_batches
    sides = [stage.image_size or image_size for stage in config.whole_stages]
    sizes = list(zip(config.batch_sizes, sides, strict=True))
    with _sharded(config, cluster, model, sharding, mode) as no_sync:
        passes = {}
        for samples, side in dict.fromkeys(sizes):
            rows = -(-samples // (cluster.ranks * parts))
            longest = longest_batch(config, model, rows=rows, side=side, length=context_length)
            read = with_images(batch, side)
            passes[samples, side] = _passes(config, model, mode, longest, read, no_sync, teacher)
        states, update = optimizer_bytes(build_optimizer(model, config.optimizer), model, mode=mode)
        own, buffers = _bytes(model.parameters()), _bytes(model.buffers())
        gradients = _bytes(_trained(model))
    average = {"moving average": own} if config.averaging.ema_decay is not None else {}
    between = {
        "weights": own + buffers,
        **average,
        **_teacher_bytes(model, teacher),
        **{f"optimizer {kind}": size for kind, size in states.items() if size > _SMALL},
    }
    # DDP averages in buckets of its own. Sharded gradients of earlier micro-batches are whole,
    # because they are summed over ranks in the last alone.
    buckets = trained if cluster.ranks > 1 and sharding is None else 0
    held = (trained if parts > 1 else gradients) + buckets
    stages = []
    for samples, side in sizes:
        step, kept, flops = passes[samples, side]
        loss = _loss_cost(config, cluster, model, mesh, samples)
        # What the loss keeps is there until the backward pass has ended.
        most = step.peak + loss.held + _waiting_images(config, cluster, samples, side)
        memory = between | {
            "gradients": held,
            "activations": step.saved,
            "activations without recomputation": kept,
            "loss": loss.held,
            "peak": sum(between.values()) + buckets + max(most, gradients + update),
        }
        sent = {"loss": loss.sent, **_sent(config, cluster, sharding, step, trained)}
        stages.append(StepResources(memory=memory, flops=flops + loss.flops, sent=sent))
    checkpoint = weights * (own + sum({**average, **states}.values())) // own
    return Resources(parameters, stages, checkpoint, bundle)


def _waiting_images(config: TrainConfig, cluster: ClusterConfig, samples: int, side: int) -> int:
    """Return the bytes of the images of other micro-batches."""
    rows = -(-samples // cluster.ranks)
    return 3 * side**2 * FLOAT * (rows - -(-rows // config.loss.micro_batches))


def _passes(
    config: TrainConfig,
    model: PretrainingModel,
    mode: HollowTensors,
    longest: Batch,
    batch: Batch | None,
    no_sync: Callable[[], AbstractContextManager[None]],
    teacher: Bundle | None,
) -> tuple[Pass, int, int]:
    """Return a step's last passes, the bytes they save without recomputation, a sample's FLOP."""
    in_parts = config.loss.micro_batches > 1
    step = model_pass(config, model, mode, longest, no_sync=no_sync if in_parts else None)
    kept = step
    if config.adapt.grad_checkpointing != "none":
        with kept_activations(model.encoder):
            kept = model_pass(config, model, mode, longest)
    read, flops = batch or longest, kept.flops
    if batch is not None:
        flops = count_flops(config, model, batch, mode=mode)
    flops += teacher_flops(config, teacher, mode, read)
    return step, kept.saved, flops // len(read.uids)


def _teacher_bytes(model: PretrainingModel, teacher: Bundle | None) -> dict[str, int]:
    """Return what the weights of all teachers take, if there are any."""
    frozen = [teacher.model] if teacher else []
    frozen += [model.teacher.model] if isinstance(model.teacher, Teacher) else []
    return {"teachers": sum(_bytes(each.parameters()) for each in frozen)} if frozen else {}


def sharding_of(cluster: ClusterConfig) -> Sharding | None:
    """Return how weights are divided; None where they are whole on every rank."""
    if cluster.sharding is None:
        return launched_sharding(cluster.ranks)
    if cluster.sharding == "none":
        return None
    ranks = cluster.ranks if cluster.sharding == "full" else cluster.node
    return Sharding(ranks, cluster.ranks // ranks, reshard_after_forward=True)


@contextmanager
def _sharded(
    config: TrainConfig,
    cluster: ClusterConfig,
    model: PretrainingModel,
    sharding: Sharding | None,
    mode: HollowTensors,
) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Divide a hollow model over ranks that are not there, within a `with` block.

    It gives what makes the context of a pass whose gradients are not summed over ranks.
    """
    if sharding is None:
        yield nullcontext
        return
    dtype = Precision(config.precision, mode.fake_device).dtype
    if has_statistics(model) or _on_cpu(cluster):
        dtype = None  # as training does
    with imagined_world(sharding.ranks * sharding.copies):
        with mode:
            sharded = ShardedModel(
                model, model.encoder.blocks(), sharding, device=mode.fake_device, dtype=dtype
            )
        yield sharded.no_sync


def _on_cpu(cluster: ClusterConfig) -> bool:
    return cluster.world is None and not torch.accelerator.is_available()


def _sent(
    config: TrainConfig,
    cluster: ClusterConfig,
    sharding: Sharding | None,
    step: Pass,
    trained: int,
) -> dict[str, int]:
    """Return the bytes that a rank sends of gradients, and of weights where they are divided."""
    if sharding is None:
        return {"gradients": 2 * (cluster.ranks - 1) * trained // cluster.ranks}
    parts, (forward, both) = config.loss.micro_batches, step.gathered
    again = parts - 1 if config.loss.accumulation == "exact" else 0  # passes without gradients
    return {"weights": parts * both + again * forward, "gradients": step.reduced}


def _loss_cost(
    config: TrainConfig,
    cluster: ClusterConfig,
    model: PretrainingModel,
    mesh: Mesh,
    samples: int,
) -> StepCost:
    """Return what the loss of all heads costs a rank in a step; its FLOP are of a sample."""
    local, parts = samples // cluster.ranks, 1
    if config.loss.accumulation == "one_pass":
        parts = config.loss.micro_batches
    widths = head_widths(
        model.encoder.embed_dim,
        config.objectives.matryoshka,
        unimodal=model.unimodal and UNIMODAL in model.encoder.logit_scales,
    )
    texts = len(config.captions.languages) * (1 + config.captions.second)
    device = "cpu" if _on_cpu(cluster) else "cuda"  # whose tiles are larger
    sizes = [Sizes(cluster.ranks, -(-local // parts), width) for width in widths]
    heads = [step_cost(config.loss, each, mesh, texts=texts, device=device) for each in sizes]
    return StepCost(
        flops=sum(each.flops for each in heads) // sizes[0].rows,
        held=sum(each.held for each in heads),
        sent=sum(each.sent for each in heads) * parts,
        collectives=sum(each.collectives for each in heads) * parts,
    )


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
    return sum(local(each).nbytes for each in tensors)


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (each for each in model.parameters() if each.requires_grad)
