"""What a run takes of each device and of the network, found without weights or other processes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

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
from vlm.training.optimization.config import Trained
from vlm.training.optimization.optimizer import build_optimizer
from vlm.training.optimization.stages import train_only, trained_by_stages
from vlm.training.planning.hollow import HollowTensors, Pass, make_hollow, optimizer_bytes
from vlm.training.planning.passes import (
    count_flops,
    longest_batch,
    model_pass,
    saved_by_all_blocks,
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
    checkpoint: int
    """Bytes of one checkpoint."""


@dataclass(frozen=True)
class Resources:
    """What training a model takes."""

    parameters: Mapping[str, int]
    """Their number by part; towers may share some."""
    stages: Sequence[StepResources]
    """A step of each stage: what it trains, at its sizes of the batch and of images."""
    bundle: int
    """Bytes of a bundle's weights."""


def resources_of(
    config: TrainConfig,
    cluster: ClusterConfig,
    start: Bundle,
    model: PretrainingModel,
    *,
    mesh: Mesh,
    batch: Batch | None,
    teacher: Bundle | None = None,
) -> Resources:
    """Run passes of a model over tensors without contents, and return what training it takes.

    Args:
        config: The run.
        cluster: Where it is to run.
        start: What it starts from; memory must hold texts as long as its tokenizer allows.
        model: What it trains; its weights are dropped.
        mesh: The loss group's.
        batch: Samples of the data, whose texts are of natural length; None for the longest.
        teacher: Of the distillation, if there is one.
    """
    mode = HollowTensors()
    make_hollow(model, mode)
    parameters, bundle = _parameters(model), _bytes(model.encoder.parameters())
    planner = _Planner(config, cluster, start, model, mode, mesh, teacher)
    size = start.preprocess_cfg["size"]
    image_size = size if isinstance(size, int) else size[0]
    kinds = [
        _Kind(samples, stage.image_size or image_size, stage.trained)
        for samples, stage in zip(config.batch_sizes, config.whole_stages, strict=True)
    ]
    # Before weights are divided, which changes no FLOP and takes longer.
    whole = {kind: planner.whole(kind, batch) for kind in planner.each(kinds)}
    with _sharded(config, cluster, model, mode) as sharded:
        optimizer = build_optimizer(model, config.optimizer)
        steps = {
            kind: planner.step(kind, whole[kind], sharded, optimizer)
            for kind in planner.each(kinds)
        }
    return Resources(parameters, [steps[kind] for kind in kinds], bundle)


class _Kind(NamedTuple):
    """What the resources of a stage's steps depend on."""

    samples: int
    side: int
    trained: Trained


class _Whole(NamedTuple):
    """What is known of a step before weights are divided."""

    flops: int
    """Of a sample, without the loss."""
    weights: int
    """Bytes of all weights."""
    trained: int
    """Bytes of those that are trained."""


@dataclass(frozen=True)
class _Planner:
    """Finds what the steps of a run take, one kind after the other."""

    config: TrainConfig
    cluster: ClusterConfig
    start: Bundle
    model: PretrainingModel
    mode: HollowTensors
    mesh: Mesh
    teacher: Bundle | None

    def each(self, kinds: Iterable[_Kind]) -> Iterator[_Kind]:
        """Give each kind once, while what it does not train is locked."""
        model, first_new = self.model, self.start.first_new_id
        parts = trained_by_stages(self.config, model, model.encoder, first_new)
        for kind in dict.fromkeys(kinds):
            train_only(parts[kind.trained], of=parts["all"])
            yield kind
        train_only(parts["all"], of=parts["all"])

    def whole(self, kind: _Kind, batch: Batch | None) -> _Whole:
        """Return what is known before weights are divided."""
        read = with_images(batch, kind.side) or self._longest(kind)
        flops = count_flops(self.config, self.model, read, mode=self.mode)
        flops += teacher_flops(self.config, self.teacher, self.mode, read)
        weights, trained = _bytes(self.model.parameters()), _bytes(_trained(self.model))
        return _Whole(flops // len(read.uids), weights, trained)

    def step(
        self,
        kind: _Kind,
        whole: _Whole,
        sharded: ShardedModel | None,
        optimizer: torch.optim.Optimizer,
    ) -> StepResources:
        """Return what a step takes."""
        config, model, parts = self.config, self.model, self.config.loss.micro_batches
        no_sync = sharded.no_sync if sharded else nullcontext
        longest = self._longest(kind)
        step = model_pass(config, model, self.mode, longest, no_sync=no_sync if parts > 1 else None)
        kept = step.saved
        if config.adapt.grad_checkpointing != "none":
            kept = saved_by_all_blocks(config, model, self.mode, longest)
            if sharded:
                sharded.forget_passes()
        moments, update = optimizer_bytes(optimizer, model, mode=self.mode)
        own, gradients = _bytes(model.parameters()), _bytes(_trained(model))
        average = {"moving average": own} if config.averaging.ema_decay is not None else {}
        between = {
            "weights": own + _bytes(model.buffers()),
            **average,
            **_teacher_bytes(model, self.teacher),
            **{f"optimizer {kind}": size for kind, size in moments.items() if size > _SMALL},
        }
        # DDP averages in buckets of its own. Sharded gradients of earlier micro-batches are whole,
        # because they are summed over ranks in the last alone.
        buckets = whole.trained if self.cluster.ranks > 1 and sharded is None else 0
        held = (whole.trained if parts > 1 else gradients) + buckets
        loss = _loss_cost(config, self.cluster, model, self.mesh, kind.samples)
        # What the loss keeps is there until the backward pass has ended.
        most = step.peak + loss.held + _waiting_images(config, self.cluster, kind)
        memory = between | {
            "gradients": held,
            "activations": step.saved,
            "activations without recomputation": kept,
            "loss": loss.held,
            "peak": sum(between.values()) + buckets + max(most, gradients + update),
        }
        return StepResources(
            memory=memory,
            flops=whole.flops + loss.flops,
            sent={"loss": loss.sent, **self._sent(step, whole, is_sharded=sharded is not None)},
            checkpoint=whole.weights * (own + sum({**average, **moments}.values())) // own,
        )

    def _longest(self, kind: _Kind) -> Batch:
        rows = -(-kind.samples // (self.cluster.ranks * self.config.loss.micro_batches))
        length = self.start.tokenizer.context_length
        return longest_batch(self.config, self.model, rows=rows, side=kind.side, length=length)

    def _sent(self, step: Pass, whole: _Whole, *, is_sharded: bool) -> dict[str, int]:
        """Return the bytes that a rank sends of gradients, and of divided weights."""
        if not is_sharded:
            ranks = self.cluster.ranks
            return {"gradients": 2 * (ranks - 1) * whole.trained // ranks}
        parts, (forward, both) = self.config.loss.micro_batches, step.gathered
        again = parts - 1 if self.config.loss.accumulation == "exact" else 0  # without gradients
        return {"weights": parts * both + again * forward, "gradients": step.reduced}


def _waiting_images(config: TrainConfig, cluster: ClusterConfig, kind: _Kind) -> int:
    """Return the bytes of the images of other micro-batches."""
    rows = -(-kind.samples // cluster.ranks)
    return 3 * kind.side**2 * FLOAT * (rows - -(-rows // config.loss.micro_batches))


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
    mode: HollowTensors,
) -> Iterator[ShardedModel | None]:
    """Divide a hollow model over ranks that are not there, within a `with` block, if asked to."""
    sharding = sharding_of(cluster)
    if sharding is None:
        yield None
        return
    dtype = Precision(config.precision, mode.fake_device).dtype
    if has_statistics(model) or _on_cpu(cluster):
        dtype = None  # as training does
    with imagined_world(sharding.ranks * sharding.copies):
        with mode:
            sharded = ShardedModel(
                model, model.encoder.blocks(), sharding, device=mode.fake_device, dtype=dtype
            )
        yield sharded


def _on_cpu(cluster: ClusterConfig) -> bool:
    return cluster.world is None and not torch.accelerator.is_available()


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
