"""Build the parts of a run that a configuration names."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from torch import nn

from vlm.batches.examples import TrainingExamples, second_of
from vlm.batches.loader import TrainingLoader
from vlm.batches.mixture import BatchOrder, mixture_of
from vlm.batches.order import SourceOrder
from vlm.bundle import Bundle, load_bundle
from vlm.data.config import SourceConfig
from vlm.data.layout import has_manifest, splits_of
from vlm.data.source import Source, open_source
from vlm.distributed.groups import world_group
from vlm.distributed.mesh import ranks_per_node
from vlm.embedding.embedder import Embedder
from vlm.errors import ConfigError
from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
from vlm.evaluation.retrieval.pairs import pairs_of_split
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import TrainingTransform, evaluation_transform, preprocess_cfg
from vlm.losses.bilingual import BilingualLoss
from vlm.models.batch_norm import synchronize_batch_norm
from vlm.models.build import build_from_config, encoder_model_cfg, image_size
from vlm.models.encoder import Encoder
from vlm.models.pretraining import PretrainingModel
from vlm.models.text_thread import TextThread
from vlm.text.tokenizer import load_tokenizer
from vlm.training.adaptation import adapt
from vlm.training.checkpoint import Checkpoints
from vlm.training.config import EvaluationConfig, TrainConfig, config_as_yaml
from vlm.training.objectives import build_pretraining_model, loss_weights, mask_plan
from vlm.training.optimizer import build_optimizer
from vlm.training.reporter import METRICS_NAME, read_records
from vlm.training.run import BUNDLE_NAME, CHECKPOINTS_NAME, CONFIG_NAME, Run
from vlm.training.step import ContrastiveStep

_FREE_ON_RESUME = (
    "run_folder", "cpu_threads", "parallel_towers", "report_every", "data.workers",
    "data.keep_decoded", "evaluation", "data.allowed_share", "data.cache_gib", "data.verify",
    "data.sources", "data.mixture", "data.skip_batches", "checkpoint", "loss.plan.tile",
    "loss.plan.keep_logits", "loss.plan.keep_logits_mib", "loss.plan.overlap",
    "loss.plan.check_finite",
)  # fmt: skip
"""Settings, and sections of them, that may change: what a run has learnt and read stays exact."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 1 << 30  # larger tensors, and as much unused memory at a time, still go back

_LOOKED_AT = 100  # shards, for their languages: a start reads little, whatever the size of the data


def build_run(config: TrainConfig, *, resume: bool = False) -> Run:
    """Build the run that a configuration describes; nothing is written yet.

    Every rank calls this at the same point. To resume is to continue from the newest checkpoint in
    the run's folder.

    Raises:
        VlmError: something in the configuration, the data or the run's folder is not as it
            must be; the message says what was found and what was expected.
    """
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    accelerator = Accelerator(
        # Without this accelerate takes processes that have no GPU for one process each.
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if config.precision == "bf16" else "no",
    )
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    _check_run_folder(config, resume)
    start = build_start(config)
    loader = _build_loader(config, start, accelerator)
    loss = _build_loss(config, start.model.logit_bias is not None, accelerator.num_processes)
    evaluate = _build_evaluation(config, start)
    # Batch norm is always over the whole batch, so that a run does not depend on its processes.
    model: nn.Module = synchronize_batch_norm(
        _build_model(config, start, accelerator), world_group(), accelerator.device
    )
    model, optimizer = accelerator.prepare(model, build_optimizer(model, config.optimizer))
    run = Run(
        config=config,
        accelerator=accelerator,
        start=start,
        model=model,
        optimizer=optimizer,
        step=ContrastiveStep(
            model,
            loss,
            mode=config.loss.accumulation,
            weights=loss_weights(config.objectives),
            backward=accelerator.backward,
            no_sync=lambda: accelerator.no_sync(model),
        ),
        loader=loader,
        data=loader.order.start(),
        checkpoints=Checkpoints(
            config.run_folder / CHECKPOINTS_NAME,
            keep=config.checkpoint.keep,
            writes=accelerator.is_main_process,
        ),
        evaluate=evaluate,
    )
    if resume and run.checkpoints.load_latest(run.state):
        # Whatever the nodes are now.
        run = replace(run, loader=loader.with_streams(run.data.streams))
    return run


def _keep_freed_memory() -> None:
    """Let this process keep what a step frees for the next one, where its C library is glibc.

    It would give the larger tensors back to the system, which clears every page of them again at
    each step: a tenth of a small model's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def build_start(config: TrainConfig) -> Bundle:
    """Build the model of a configuration with weights by its seed, or read that of its bundle.

    Raises:
        VlmError: the model cannot be built, or the bundle not read.
        ConfigError: the configuration describes a model as well as naming a bundle, or asks for
            steps of new rows where there are none.
    """
    if config.start_from is None:
        tokenizer = load_tokenizer(config.tokenizer)
        torch.manual_seed(config.seed)
        model_cfg = encoder_model_cfg(config.model, tokenizer)
        described = preprocess_cfg(config.preprocess, image_size(model_cfg))
        start = Bundle(
            model=build_from_config(config.model, tokenizer),
            tokenizer=tokenizer,
            transform=evaluation_transform(described),
            model_cfg=model_cfg,
            preprocess_cfg=described,
        )
    else:
        start = _from_bundle(config, config.start_from)
    if config.schedule.new_rows_steps and start.first_new_id is None:
        raise ConfigError(
            f"schedule.new_rows_steps is {config.schedule.new_rows_steps}, but the model has no "
            "new rows; expected start_from a bundle of `vlm grow` or `vlm convert --extend`"
        )
    return start


def _from_bundle(config: TrainConfig, path: Path) -> Bundle:
    plain, names = TrainConfig(), ("model", "tokenizer", "preprocess")
    described = [name for name in names if getattr(config, name) != getattr(plain, name)]
    if described:
        raise ConfigError(
            f"start_from gives the model, tokenizer and image transform; expected no settings of "
            f"{', '.join(described)}"
        )
    bundle = load_bundle(path)
    torch.manual_seed(config.seed)
    return bundle


def _check_run_folder(config: TrainConfig, resume: bool) -> None:
    """Refuse to overwrite a run, or to go on with one under settings that it did not have."""
    folder = config.run_folder
    kept = (folder / CONFIG_NAME).exists() and (
        (folder / CHECKPOINTS_NAME).exists()
        or (folder / BUNDLE_NAME).exists()
        or bool(read_records(folder / METRICS_NAME))
    )
    if not kept:  # a start that failed before it left anything does not take the folder
        return
    if not resume:
        raise ConfigError(
            f"{folder} holds a run already; go on with it by --resume, or choose another run_folder"
        )
    before, now = (
        _flat(yaml.safe_load(text))
        for text in ((folder / CONFIG_NAME).read_text(encoding="utf-8"), config_as_yaml(config))
    )
    changed = [
        f"{name} {now.get(name)} (was {before.get(name)})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(f"{name}.".startswith(f"{free}.") for free in _FREE_ON_RESUME)
    ]
    if changed:
        raise ConfigError(
            f"cannot resume {folder} with changed settings: {', '.join(changed)}; expected those "
            f"of its {CONFIG_NAME}, or another run_folder"
        )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _build_loader(config: TrainConfig, start: Bundle, accelerator: Accelerator) -> TrainingLoader:
    data = config.data
    sources = {
        name: open_source(each, verify=data.verify, cache_gib=data.cache_gib)
        for name, each in data.by_name.items()
    }
    _check_languages(list(sources.values()), config.captions.languages)
    streams = data.streams or accelerator.num_processes // ranks_per_node()
    label = data.mixture.batch_by if data.mixture.batch_by != "source" else ""
    if label:
        _check_label(list(sources.values()), label)
    order = BatchOrder(
        [
            SourceOrder(
                name,
                np.array(source.sizes),
                streams,  # of a new run: its nodes, so that each reads its own shards
                config.seed,
                groups=partial(source.label_ids, label) if label else None,
                run=max(data.batch_size // streams, 1),
            )
            for name, source in sources.items()
        ],
        mixture_of(data, {name: len(source) for name, source in sources.items()}),
        data.batch_size,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    read = -(-streams // accelerator.num_processes)  # streams that a rank reads
    examples = TrainingExamples(
        [
            source.keeping_open(read * each.open_shards)
            for source, each in zip(sources.values(), order.sources, strict=True)
        ],
        order.sources,
        _training_transform(config, start),
        config.captions,
        seed=config.seed,
        keep_decoded=config.data.keep_decoded,
    )
    return TrainingLoader(
        examples,
        order,
        start.tokenizer,
        workers=config.data.workers,
        masks=mask_plan(config.objectives.masked, start.model),
    )


def _training_transform(config: TrainConfig, start: Bundle) -> TrainingTransform:
    """Return the augmentation of a run around the image transform of what it starts from."""
    size = start.preprocess_cfg["size"]
    known = {field.name for field in fields(PreprocessConfig)}
    settings = {name: value for name, value in start.preprocess_cfg.items() if name in known}
    settings |= {name: tuple(settings[name]) for name in ("mean", "std")}
    side = size if isinstance(size, int) else size[0]
    return TrainingTransform(PreprocessConfig(**settings), config.augmentation, side)


def _check_languages(sources: Sequence[Source], languages: Sequence[str]) -> None:
    """Refuse languages that no sample has: their terms of the loss would be 0 all the way."""
    found: set[str] = set()
    shards = [(source, shard) for source in sources for shard in range(len(source.sizes))]
    for source, shard in shards[:_LOOKED_AT]:
        for row in source.rows(shard, ["languages"]):
            found |= set(filter(None, row["languages"].split("+")))
        if found.issuperset(languages):
            return
    if len(shards) > _LOOKED_AT:
        return
    missing = [language for language in languages if language not in found]
    raise ConfigError(
        f"captions.languages has {', '.join(missing)}, but "
        f"{' and '.join(source.name for source in sources)} have captions in "
        f"{', '.join(sorted(found)) or 'no language'} only; expected some of these"
    )


def _check_label(sources: Sequence[Source], label: str) -> None:
    """Refuse to batch by a label that no sample has."""
    shards = [(source, shard) for source in sources for shard in range(len(source.sizes))]
    for source, shard in shards[:_LOOKED_AT]:
        if any(label in dict(row["labels"] or ()) for row in source.rows(shard, ["labels"])):
            return
    if len(shards) <= _LOOKED_AT:
        raise ConfigError(
            f"data.mixture.batch_by is {label!r}, a label that no sample has; expected `source` or "
            "a label"
        )


def _build_loss(config: TrainConfig, has_bias: bool, ranks: int) -> BilingualLoss:
    """Build the loss; a collective operation."""
    loss, languages = config.loss, config.captions.languages
    if (loss.plan.kind == "sigmoid") != has_bias:
        raise ConfigError(
            f"loss.plan.kind is {loss.plan.kind} and the model has {'a' if has_bias else 'no'} "
            "bias; expected model.init_logit_bias for a sigmoid loss, for example -10, and none "
            "for a softmax"
        )
    if (
        loss.plan.kind == "softmax"
        and config.data.batch_size // ranks * (loss.plan.group_size or ranks) < 2
    ):
        raise ConfigError(
            f"data.batch_size is {config.data.batch_size}, so that an image is compared with one "
            "caption alone, where a softmax is always 0; expected at least 2 in a loss group"
        )
    if loss.text_text_weight and len(languages) != 2:
        raise ConfigError(
            f"loss.text_text_weight is {loss.text_text_weight} for the languages "
            f"{', '.join(languages)}; expected two languages"
        )
    return BilingualLoss(
        loss.plan,
        weights={second_of(language): loss.second_weight for language in languages},
        together=loss.captions == "together",
        text_pair=(languages[0], languages[1]) if loss.text_text_weight else None,
        text_pair_weight=loss.text_text_weight,
    )


def _build_model(config: TrainConfig, start: Bundle, accelerator: Accelerator) -> PretrainingModel:
    if config.objectives.masked.weights and config.adapt.patch_dropout:
        raise ConfigError(
            f"adapt.patch_dropout is {config.adapt.patch_dropout}, but masked modelling reads "
            "every patch; expected 0, or no cmlm_weight and cmim_weight"
        )
    adapt(start.model, config.adapt)
    languages = config.captions.languages
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
    return build_pretraining_model(
        start.model,
        config.objectives,
        languages={
            name: language for language in languages for name in (language, second_of(language))
        },
        preprocess_cfg=start.preprocess_cfg,
        text_thread=TextThread(start.model) if config.parallel_towers and alone else None,
    )


def _build_evaluation(
    config: TrainConfig, start: Bundle
) -> Callable[[Encoder], dict[str, float]] | None:
    """Return a function that every rank calls, since the ranks share the work; None for none."""
    plan, languages = config.evaluation, config.captions.languages
    if plan.every_steps == 0 or (plan.folder is None and not _has_split_to_score(config)):
        return None
    # Read before the first step, so that a missing split does not end a run half way.
    split, asked = (
        plan.split,
        SourceConfig(path=str(plan.folder or config.data.folder), split=plan.split),
    )
    pairs = pairs_of_split(asked, languages=languages, cache_gib=config.data.cache_gib)

    def evaluate(encoder: Encoder) -> dict[str, float]:
        embedder = Embedder(start, model=encoder)
        scores = evaluate_retrieval(embedder, pairs, group=world_group())
        return {f"{split}/{name}": value for name, value in scores.items()}

    return evaluate


def _has_split_to_score(config: TrainConfig) -> bool:
    """Say whether the run's own data can be scored; a split that was asked for must be there."""
    data, split = config.data, config.evaluation.split
    own = SourceConfig(path=str(data.folder))
    is_folder = not data.sources and has_manifest(own.path)
    return is_folder and (split != EvaluationConfig().split or split in splits_of(own))
