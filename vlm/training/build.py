"""Build the parts of a run that a configuration names."""

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import nn

from vlm.batches.examples import caption_names, second_of
from vlm.bundle import Bundle
from vlm.distributed.groups import host_group, world_group
from vlm.distributed.sharding import ShardedModel, launched_sharding, sharding_is_ours
from vlm.errors import ConfigError
from vlm.losses.bilingual import BilingualLoss
from vlm.models.batch_norm import has_statistics, synchronize_batch_norm
from vlm.models.blocks import compile_blocks
from vlm.models.pretraining import PretrainingModel
from vlm.models.text_thread import TextThread
from vlm.training.adaptation import adapt, blocks_of
from vlm.training.config import TrainConfig
from vlm.training.distillation import Distillation, build_distillation
from vlm.training.monitoring.flops import FlopMeter
from vlm.training.monitoring.scoring import build_evaluation
from vlm.training.monitoring.trackers import check_trackers
from vlm.training.objectives import build_pretraining_model, loss_weights
from vlm.training.optimization.averaging import MovingAverage
from vlm.training.optimization.optimizer import build_optimizer
from vlm.training.optimization.stages import StageLocks
from vlm.training.precision import Precision
from vlm.training.reading import build_loader
from vlm.training.run import Run
from vlm.training.safety.guard import Guard
from vlm.training.saving.checkpoint import Checkpoints, Resume
from vlm.training.saving.resuming import CHECKPOINTS_NAME, check_run_folder, compared
from vlm.training.start import build_start
from vlm.training.step import ContrastiveStep

_PATIENCE = timedelta(hours=1)
"""How long a rank waits for another one that writes its part of a checkpoint."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h


def build_run(config: TrainConfig, *, resume: Resume = "never") -> Run:
    """Build the run that a configuration describes; nothing is written yet.

    Every rank calls this at the same point. With `auto` the run goes on from the newest checkpoint
    in its folder that is whole, and starts where there is none; with a path from that checkpoint.

    Raises:
        VlmError: something in the configuration, the data or the run's folder is not as it
            must be; the message says what was found and what was expected.
    """
    _set_up_process(config)
    accelerator = _build_accelerator()
    precision = Precision(config.precision, accelerator.device)
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    check_run_folder(config, resume)
    checkpoints = _build_checkpoints(config)
    found = checkpoints.find(resume)
    origin = compared(config, found, world_size=accelerator.num_processes)
    start = build_start(config)
    loader = build_loader(config, start, accelerator)
    loss = _build_loss(config, start.model.logit_bias is not None, accelerator.num_processes)
    evaluate = build_evaluation(config, start)
    distillation = build_distillation(config, start, loss, precision, accelerator.device)
    # Batch norm is always over the whole batch, so that a run does not depend on its processes.
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
    built = build_model(config, start, may_thread=alone)
    flops = FlopMeter(config, built, accelerator.device, accelerator.num_processes)
    plain = synchronize_batch_norm(built, world_group(), accelerator.device)
    if config.compile:
        compile_blocks(blocks_of(start.model))
    sharded = _shard(plain, start.model.blocks(), accelerator, precision.dtype)
    model: nn.Module = accelerator.prepare_model(plain) if sharded is None else plain
    optimizer = build_optimizer(plain, config.optimizer)
    decay = config.averaging.ema_decay
    run = Run(
        config=config,
        accelerator=accelerator,
        start=start,
        model=model,
        optimizer=optimizer,
        average=None if decay is None else MovingAverage(plain, decay),
        stages=StageLocks(config, model, start.model, optimizer, start.first_new_id),
        step=_build_step(
            config,
            model,
            loss,
            distillation,
            precision,
            sharded.no_sync if sharded else lambda: accelerator.no_sync(model),
        ),
        precision=precision,
        sharded=sharded,
        distillation=distillation,
        loader=loader,
        data=loader.order.start(),
        checkpoints=checkpoints,
        origin=origin,
        evaluate=evaluate,
        flops=flops,
        guard=Guard(config.guard, plain, world_group()),
    )
    if found is not None:
        checkpoints.load(found, run.state)
        if run.average is not None and "ema" not in found.numbers:
            run.average.restart()
        # Whatever the nodes are now.
        run = replace(run, loader=loader.with_streams(run.data.streams))
    run.stages.enter(run.progress.step)
    return run


def _build_accelerator() -> Accelerator:
    """Join the ranks that the launcher started, each with its device."""
    with sharding_is_ours():
        return Accelerator(
            # Without this accelerate takes processes that have no GPU for one process each.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",  # `Precision` is the run's
        )


def _shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    accelerator: Accelerator,
    dtype: torch.dtype | None,
) -> ShardedModel | None:
    """Divide a model's weights over ranks, in place, if the launcher was asked to."""
    sharding = launched_sharding(accelerator.num_processes)
    if sharding is None:
        return None
    device = accelerator.device
    if has_statistics(model) or device.type == "cpu":
        # A batch norm's sums need its weights as they are, and so do a CPU's other norms.
        dtype = None
    return ShardedModel(model.to(device), blocks, sharding, device=device, dtype=dtype)


def _build_checkpoints(config: TrainConfig) -> Checkpoints:
    """Return the checkpoints of a run; a collective operation."""
    return Checkpoints(
        config.run_folder / CHECKPOINTS_NAME,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        in_background=config.checkpoint.in_background,
        group=host_group(_PATIENCE),
    )


def _set_up_process(config: TrainConfig) -> None:
    """Look for the packages that are asked for, and say how torch computes."""
    check_trackers(config.trackers)
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    if config.deterministic:
        # cuBLAS reads it when it is first used; of its two such settings that which is not slow.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _keep_freed_memory() -> None:
    """Let this process keep what a step frees for the next one, where its C library is glibc.

    It would give the larger tensors back to the system, which clears every page of them again at
    each step: a tenth of a small model's time. The backward pass's thread would have an arena of
    its own, whose every 64 MiB go back as soon as they are free, whatever the threshold is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)  # larger tensors still come and go
        mallopt(_M_ARENA_MAX, 1)


def check_loss(config: TrainConfig, has_bias: bool, ranks: int) -> None:
    """Refuse a loss that does not fit the model, the languages or the batch of each rank."""
    loss, languages = config.loss, config.captions.languages
    if (loss.plan.kind == "sigmoid") != has_bias:
        raise ConfigError(
            f"loss.plan.kind is {loss.plan.kind} and the model has {'a' if has_bias else 'no'} "
            "bias; expected model.init_logit_bias for a sigmoid loss, for example -10, and none "
            "for a softmax"
        )
    smallest = min(config.batch_sizes)
    if loss.plan.kind == "softmax" and smallest // ranks * (loss.plan.group_size or ranks) < 2:
        raise ConfigError(
            f"a batch has {smallest} samples, so that an image is compared with one caption alone, "
            "where a softmax is always 0; expected at least 2 in a loss group"
        )
    if loss.text_text_weight and len(languages) != 2:
        raise ConfigError(
            f"loss.text_text_weight is {loss.text_text_weight} for the languages "
            f"{', '.join(languages)}; expected two languages"
        )


def _build_loss(config: TrainConfig, has_bias: bool, ranks: int) -> BilingualLoss:
    """Build the loss; a collective operation."""
    check_loss(config, has_bias, ranks)
    loss, languages = config.loss, config.captions.languages
    return BilingualLoss(
        loss.plan,
        weights={second_of(language): loss.second_weight for language in languages},
        together=loss.captions == "together",
        text_pair=(languages[0], languages[1]) if loss.text_text_weight else None,
        text_pair_weight=loss.text_text_weight,
    )


def _build_step(
    config: TrainConfig,
    model: nn.Module,
    loss: BilingualLoss,
    distillation: Distillation | None,
    precision: Precision,
    no_sync: Callable[[], AbstractContextManager[None]],
) -> ContrastiveStep:
    return ContrastiveStep(
        model,
        loss,
        mode=config.loss.accumulation,
        weights=loss_weights(config.objectives),
        backward=precision.backward,
        no_sync=no_sync,
        autocast=precision.autocast,
        distillation=distillation,
    )


def build_model(
    config: TrainConfig, start: Bundle, *, may_thread: bool = False
) -> PretrainingModel:
    """Put what only training has around the model of a bundle, which is adapted in place."""
    if config.objectives.masked.weights and config.adapt.patch_dropout:
        raise ConfigError(
            f"adapt.patch_dropout is {config.adapt.patch_dropout}, but masked modelling reads "
            "every patch; expected 0, or no cmlm_weight and cmim_weight"
        )
    adapt(start.model, config.adapt)
    _accept_image_sizes(config, start)
    return build_pretraining_model(
        start.model,
        config.objectives,
        languages=caption_names(config.captions.languages),
        preprocess_cfg=start.preprocess_cfg,
        text_thread=TextThread(start.model) if config.parallel_towers and may_thread else None,
    )


def _accept_image_sizes(config: TrainConfig, start: Bundle) -> None:
    """Prepare a model for the sizes of images that stages have."""
    sizes = [stage.image_size for stage in config.whole_stages if stage.image_size is not None]
    objectives = config.objectives
    if sizes and (objectives.masked.weights or objectives.distillation.weights):
        raise ConfigError(
            f"a stage has image_size {sizes[0]}, but masked modelling and teachers read images of "
            "the model's size; expected null, or none of these"
        )
    for size in dict.fromkeys(sizes):
        start.model.accept_image_size(size)
