"""One training run: build the parts that a configuration names, train, leave a bundle."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from vlm.bundle import Bundle, save_bundle
from vlm.data.dataset import ShardedSplit
from vlm.data.loader import BatchOrder, TrainingExamples, TrainingLoader, second_of
from vlm.data.sample import Batch
from vlm.distributed.groups import world_group
from vlm.embedding.embedder import Embedder
from vlm.errors import ConfigError
from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
from vlm.evaluation.retrieval.pairs import pairs_of_split
from vlm.files import write_file
from vlm.images.transforms import TrainingTransform, evaluation_transform
from vlm.losses.bilingual import BilingualLoss
from vlm.models.batch_norm import synchronize_batch_norm
from vlm.models.encoder import Encoder
from vlm.models.lora import without_lora
from vlm.models.pretraining import PretrainingModel
from vlm.training.adaptation import adapt
from vlm.training.checkpoint import Checkpoints, Progress
from vlm.training.config import TrainConfig, config_as_yaml
from vlm.training.objectives import (
    build_pretraining_model,
    check_patches,
    loss_weights,
    mask_plan,
)
from vlm.training.optimizer import build_optimizer
from vlm.training.reporter import Reporter
from vlm.training.start import Start, build_start
from vlm.training.step import CachedContrast
from vlm.training.trainer import LoopConfig, Trainer

BUNDLE_NAME, CONFIG_NAME = "bundle", "config.yaml"


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Run, or go on with, the training that a configuration describes.

    Args:
        config: The run.
        resume: Whether to continue from the newest checkpoint in the run's folder.

    Returns:
        The folder of the bundle that the run leaves.

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
    _check_run_folder(config.run_folder, resume)
    start = build_start(config)
    loader = _build_loader(config, start, accelerator)
    loss = _build_loss(config, start.encoder.logit_bias is not None)
    evaluate = _evaluation(config, start)
    model, optimizer = _prepare(_build_model(config, start), config, accelerator)
    trained: PretrainingModel = accelerator.unwrap_model(model)
    checkpoints = Checkpoints(config.run_folder / "checkpoints", keep=config.checkpoint.keep)
    progress = (checkpoints.load_latest(trained, optimizer) if resume else None) or Progress(0, 0)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_file(config.run_folder / CONFIG_NAME, config_as_yaml(config).encode())
    with Reporter(
        config.run_folder,
        samples=config.schedule.steps * config.data.batch_size,
        progress=progress,
        active=accelerator.is_main_process,
    ) as reporter:
        trainer = Trainer(
            config=_loop_config(config),
            accelerator=accelerator,
            model=model,
            optimizer=optimizer,
            contrast=_build_contrast(config, loss, model, accelerator),
            loader=loader,
            checkpoints=checkpoints,
            reporter=reporter,
            evaluate=evaluate,
            first_new_id=start.first_new_id,
        )
        trainer.fit(progress)
    bundle = config.run_folder / BUNDLE_NAME
    if accelerator.is_main_process:
        _save(config, start, bundle)
    accelerator.end_training()
    return bundle


def _save(config: TrainConfig, start: Start, bundle: Path) -> None:
    save_bundle(
        bundle,
        model=without_lora(start.encoder),
        model_cfg=start.model_cfg,
        preprocess_cfg=start.preprocess_cfg,
        tokenizer=start.tokenizer,
        languages=tuple(dict.fromkeys((*start.languages, *config.captions.languages))),
        truncate_dims=config.objectives.matryoshka,
    )


def _check_run_folder(folder: Path, resume: bool) -> None:
    if not resume and (folder / CONFIG_NAME).exists():
        raise ConfigError(
            f"{folder} holds a run already; go on with it by --resume, or choose another run_folder"
        )


def _build_loader(config: TrainConfig, start: Start, accelerator: Accelerator) -> TrainingLoader:
    samples = ShardedSplit(config.data.folder, config.data.split)
    order = BatchOrder(
        size=len(samples),
        global_batch_size=config.data.batch_size,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    transform = TrainingTransform(start.preprocess, config.augmentation, start.image_size)
    examples = TrainingExamples(
        samples,
        transform,
        config.captions,
        seed=config.seed,
        keep_decoded=config.data.keep_decoded,
    )
    return TrainingLoader(
        examples,
        order,
        start.tokenizer,
        workers=config.data.workers,
        masks=mask_plan(config.objectives.masked, start.encoder),
    )


def _build_loss(config: TrainConfig, has_bias: bool) -> BilingualLoss:
    """Build the loss; a collective operation.

    Raises:
        ConfigError: the loss does not go with the model or the captions.
        DistributedError: its groups do not go with the number of processes.
    """
    loss, languages = config.loss, config.captions.languages
    if (loss.plan.kind == "sigmoid") != has_bias:
        raise ConfigError(
            f"loss.plan.kind is {loss.plan.kind} and the model has {'a' if has_bias else 'no'} "
            "bias; expected model.init_logit_bias for a sigmoid loss, for example -10, and none "
            "for a softmax"
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


def _build_contrast(
    config: TrainConfig, loss: BilingualLoss, model: nn.Module, accelerator: Accelerator
) -> CachedContrast[Batch]:
    return CachedContrast(
        loss,
        model,
        mode=config.loss.accumulation,
        weights=loss_weights(config.objectives),
        backward=accelerator.backward,
        no_sync=lambda: accelerator.no_sync(model),
    )


def _build_model(config: TrainConfig, start: Start) -> PretrainingModel:
    check_patches(config.objectives, config.adapt.patch_dropout)
    adapt(start.encoder, config.adapt)
    languages = config.captions.languages
    return build_pretraining_model(
        start.encoder,
        config.objectives,
        languages={
            name: language for language in languages for name in (language, second_of(language))
        },
        preprocess_cfg=start.preprocess_cfg,
    )


def _prepare(
    model: nn.Module, config: TrainConfig, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    # Batch norm is always over the whole batch, so that a run does not depend on its processes.
    model = synchronize_batch_norm(model, world_group(), accelerator.device)
    optimizer = build_optimizer(model, config.optimizer)
    prepared: tuple[nn.Module, torch.optim.Optimizer] = accelerator.prepare(model, optimizer)
    return prepared


def _loop_config(config: TrainConfig) -> LoopConfig:
    return LoopConfig(
        schedule=config.schedule,
        learning_rate=config.optimizer.learning_rate,
        max_gradient_norm=config.optimizer.max_gradient_norm,
        report_every=config.report_every,
        evaluate_every=config.evaluation.every_steps,
        checkpoint_every=config.checkpoint.every_steps,
        micro_batches=config.loss.micro_batches,
        seed=config.seed,
    )


def _evaluation(config: TrainConfig, start: Start) -> Callable[[Encoder], dict[str, float]]:
    split, languages = config.evaluation.split, config.captions.languages
    bundle = Bundle(
        model=start.encoder,
        tokenizer=start.tokenizer,
        transform=evaluation_transform(start.preprocess_cfg),
        languages=languages,
        model_cfg=start.model_cfg,
        preprocess_cfg=start.preprocess_cfg,
    )
    # Read before the first step, so that a missing split does not end a run half way.
    asked = config.evaluation.every_steps > 0
    pairs = pairs_of_split(config.data.folder, split, languages=languages) if asked else None

    def evaluate(model: Encoder) -> dict[str, float]:
        assert pairs is not None
        scores = evaluate_retrieval(Embedder(bundle, model=model), pairs)
        return {f"{split}/{name}": value for name, value in scores.items()}

    return evaluate
