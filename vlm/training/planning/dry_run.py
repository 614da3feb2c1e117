"""What a run would take, and what would stop it later: its plan, made without training.

The model has no weights and the other processes are not there, so that a machine without a GPU
plans for any cluster. Of each source some samples are really read.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm.batches.batch import Batch
from vlm.batches.collate import collate
from vlm.batches.mixture import BatchOrder
from vlm.bundle import Bundle
from vlm.data.source import Source, open_source
from vlm.distributed.mesh import loss_groups, mesh_shape
from vlm.errors import ConfigError, VlmError
from vlm.losses.costs import Mesh
from vlm.models.pretraining import PretrainingModel
from vlm.training.build import build_model, check_loss
from vlm.training.config import ClusterConfig, TrainConfig
from vlm.training.distillation import load_teacher
from vlm.training.monitoring.scoring import build_evaluation
from vlm.training.objectives import mask_plan
from vlm.training.planning.resources import resources_of
from vlm.training.reading import (
    batch_sizes,
    check_languages,
    examples_of,
    mixture,
    source_orders,
)
from vlm.training.saving.checkpoint import Checkpoints, Resume
from vlm.training.saving.resuming import CHECKPOINTS_NAME, check_run_folder, compared
from vlm.training.start import build_start

_READ = 32  # samples of each source
_DAY = 24 * 3600


@dataclass(frozen=True)
class Plan:
    """What a run would take, by part and name, and what would stop or hurt it."""

    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What would end the run, a sentence each."""
    warnings: list[str] = field(default_factory=list)
    """What would not, a sentence each."""

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Take an error as one of the problems, and go on after the `with` block."""
        try:
            yield
        except VlmError as error:
            self.problems.append(str(error))

    def record(self) -> dict[str, Any]:
        """Return all of it for JSON; sizes are bytes."""
        return {**self.numbers, "problems": self.problems, "warnings": self.warnings}


def dry_run(config: TrainConfig, cluster: ClusterConfig, *, resume: Resume = "never") -> Plan:
    """Plan a run on a cluster; what cannot be known for a problem is left out."""
    plan = Plan()
    ranks, nodes = cluster.ranks, -(-cluster.ranks // cluster.node)
    plan.numbers["cluster"] = {"ranks": ranks, "ranks per node": cluster.node, "nodes": nodes}
    with plan.collect():
        check_run_folder(config, resume)
        checkpoints = config.run_folder / CHECKPOINTS_NAME
        found = Checkpoints(checkpoints, keep=config.checkpoint.keep).find(resume)
        compared(config, found, world_size=ranks)
    mesh: Mesh | None = None
    with plan.collect():
        groups = loss_groups(ranks, config.loss.plan.group_size, config.loss.plan.grouping)
        mesh = mesh_shape(config.loss.plan.mesh, groups[0], cluster.node)
    start: Bundle | None = None
    with plan.collect():
        start = _start(config)
    sources = _open_sources(plan, config)
    _check_order(plan, config, cluster, sources)
    batch, model = None, None
    if start is not None:
        batch = _read(plan, config, start, sources)
        model = _check_model(plan, config, start, ranks)
    if start is not None and model is not None and mesh and config.data.batch_size >= ranks:
        with plan.collect():
            _measure(plan, config, cluster, start, model, mesh, batch)
    return plan


def _start(config: TrainConfig) -> Bundle:
    """Return what the run starts from; a model of its own has no weights."""
    if config.start_from is not None:
        return build_start(config)
    with torch.device("meta"):
        return build_start(config)


def _check_model(
    plan: Plan, config: TrainConfig, start: Bundle, ranks: int
) -> PretrainingModel | None:
    with plan.collect():
        check_loss(config, start.model.logit_bias is not None, ranks)
    with plan.collect():
        build_evaluation(config, start)
    with plan.collect():
        rows, pieces = start.model.token_embedding.num_embeddings, start.tokenizer.vocab_size
        if pieces > rows:
            raise ConfigError(
                f"the tokenizer has {pieces:,} ids and the model rows for {rows:,}; expected a row "
                "for each"
            )
        with torch.device("meta" if config.start_from is None else "cpu"):
            return build_model(config, start)
    return None


def _open_sources(plan: Plan, config: TrainConfig) -> dict[str, Source]:
    """Open each source on its own, so that all that are wrong are found at once."""
    data, found = config.data, {}
    for name, each in data.by_name.items():
        with plan.collect():
            found[name] = open_source(each, verify=data.verify, cache_gib=data.cache_gib)
    if len(found) == len(data.by_name):
        with plan.collect():
            check_languages(config, found)
    return found


def _check_order(
    plan: Plan, config: TrainConfig, cluster: ClusterConfig, sources: Mapping[str, Source]
) -> None:
    """Find out whether the sources can be read in such batches by so many ranks."""
    data = config.data
    streams = data.streams or cluster.ranks // cluster.node
    samples = {name: len(source) for name, source in sources.items()}
    total = config.samples
    order: BatchOrder | None = None
    if sources and len(sources) == len(data.by_name):
        with plan.collect():
            order = BatchOrder(
                source_orders(config, sources, streams),
                mixture(config, sources),
                data.batch_size,
                seed=config.seed,
                world_size=cluster.ranks,
                changes=batch_sizes(config),
            )
    plan.numbers["data"] = {"batch": data.batch_size, "samples": sum(samples.values())}
    if order is not None:
        for name, share in zip(samples, order.mixture.shares(0).tolist(), strict=True):
            plan.numbers["data"][f"epochs of {name}"] = round(share * total / samples[name], 2)
    for name, source in sources.items():
        if len(source.sizes) < streams:
            plan.warnings.append(
                f"the source {name!r} has {len(source.sizes)} shards for {streams} streams, one a "
                "node, so that several nodes read the same shard; expected at least as many shards"
            )


def _read(
    plan: Plan, config: TrainConfig, start: Bundle, sources: Mapping[str, Source]
) -> Batch | None:
    """Decode, augment and collate samples of each source; return those of the first."""
    batches: list[Batch] = []
    masks = mask_plan(config.objectives.masked, start.model)
    for name, source in sources.items():
        with plan.collect():
            (order,) = source_orders(config, {name: source}, streams=1)
            examples = examples_of(config, start, {name: source}, [order])
            keys = order.read(0, 0, 0, min(_READ, len(source), config.data.batch_size))
            batch = collate([examples[key] for key in keys], tokenizer=start.tokenizer, masks=masks)
            batches.append(batch)
            _describe_batch(plan, config, name, batch)
    return batches[0] if batches else None


def _describe_batch(plan: Plan, config: TrainConfig, name: str, batch: Batch) -> None:
    samples, read = len(batch.uids), config.data.by_name[name].languages
    for language in config.captions.languages:
        if read and language not in read:
            continue
        there = int((batch.text_rows[language] < samples).sum())
        if not there:
            plan.warnings.append(
                f"of {samples} samples of the source {name!r} none has a caption in {language}"
            )
            continue
        tokens = int(batch.texts[language].mask.sum()) / there
        plan.numbers["data"][f"tokens of a caption, {language}, {name}"] = round(tokens, 1)
    for skipped in batch.skipped[:1]:
        plan.warnings.append(
            f"{len(batch.skipped)} of {samples} samples of the source {name!r} cannot be used, "
            f"such as {skipped.address}: {skipped.reason}"
        )


def _measure(
    plan: Plan,
    config: TrainConfig,
    cluster: ClusterConfig,
    start: Bundle,
    model: PretrainingModel,
    mesh: Mesh,
    batch: Batch | None,
) -> None:
    teacher = load_teacher(config, start)
    found = resources_of(config, cluster, start, model, mesh=mesh, batch=batch, teacher=teacher)
    flops = [
        step.flops * samples // cluster.ranks
        for step, samples in zip(found.stages, config.batch_sizes, strict=True)
    ]
    seconds = [each / (cluster.mfu * cluster.peak_tflops * 1e12) for each in flops]
    whole = config.whole_stages
    most_memory = max(range(len(whole)), key=lambda k: found.stages[k].memory["peak"])
    most_flops = max(range(len(whole)), key=lambda k: flops[k])
    largest = {"stage of the memory": most_memory + 1, "stage of the rest": most_flops + 1}
    plan.numbers.update(
        {
            "parameters": dict(found.parameters),
            **({"largest": largest} if len(whole) > 1 else {}),
            "memory": dict(found.stages[most_memory].memory),
            "compute": {
                "FLOP of a sample": found.stages[most_flops].flops,
                "FLOP of a step and device": flops[most_flops],
            },
            "network": {"loss mesh": list(mesh), **found.stages[most_flops].sent},
            "time": {
                "seconds of a step": round(seconds[most_flops], 4),
                "steps": whole[-1].end,
                "days": round(
                    sum(each * stage.steps for each, stage in zip(seconds, whole, strict=True))
                    / _DAY,
                    2,
                ),
            },
        }
    )
    kept, checkpoint = _checkpoints(config), max(step.checkpoint for step in found.stages)
    most = found.bundle + kept * checkpoint
    free = shutil.disk_usage(_existing(config.run_folder)).free
    plan.numbers["disk"] = {"checkpoint": checkpoint, "at most": most, "free": free}
    if most > free:
        plan.problems.append(
            f"the run needs {most / 2**30:,.1f} GiB for {kept} checkpoints and a bundle, and "
            f"{config.run_folder} has {free / 2**30:,.1f} GiB; expected more room, or a smaller "
            "checkpoint.keep"
        )


def _checkpoints(config: TrainConfig) -> int:
    """Return how many checkpoints are there at a time, at most."""
    every, steps = config.checkpoint.every_steps, config.whole_stages[-1].end
    if not every:
        return 0
    for_good = steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    newest = config.checkpoint.keep + 1  # an old one goes only when the new one is complete
    return min(for_good + newest, -(-steps // every))


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))


def as_text(plan: Plan) -> str:
    """Return a plan as lines for people; problems come last."""
    lines = []
    for part, numbers in plan.numbers.items():
        width = max(map(len, numbers))
        lines.append(part)
        lines += [f"  {name:<{width}}  {_shown(part, each)}" for name, each in numbers.items()]
    lines += [f"warning: {each}" for each in plan.warnings]
    lines += [f"problem: {each}" for each in plan.problems]
    return "\n".join(lines)


def _shown(part: str, value: Any) -> str:
    """Write a number in the unit of its part of the plan."""
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if part in ("memory", "network", "disk"):
        return f"{value / 2**30:,.2f} GiB" if value >= 2**27 else f"{value / 2**20:,.2f} MiB"
    if part == "compute":
        return f"{value / 1e12:,.2f} TFLOP" if value >= 1e11 else f"{value / 1e9:,.2f} GFLOP"
    return f"{value:,}"
