"""`TrainConfig`: everything a file in `configs/train` can say."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vlm.batches.config import CaptionConfig, DataConfig
from vlm.errors import ConfigError
from vlm.images.config import AugmentationConfig, PreprocessConfig
from vlm.losses.plan import DistillationConfig, LossConfig
from vlm.models.config import MaskedConfig, ModelConfig
from vlm.training.optimization.config import (
    OptimizerConfig,
    ScheduleConfig,
    StageConfig,
    WholeStage,
    whole_stages,
)


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """The losses of a run next to the contrastive loss of its main head."""

    masked: MaskedConfig = field(default_factory=MaskedConfig)
    """Masked modelling of words and patches."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """Keeping what a frozen model knows."""
    unimodal_weight: float = 1.0
    """Weight of the second contrastive head of a multiway model, where the main one has 1; 0 leaves
    it out."""
    matryoshka: tuple[int, ...] = ()
    """Numbers N below the dimension of the features: the first N dimensions are trained as a head
    of their own, so that `truncate_dim` may keep them alone."""
    language_embeddings: bool = False
    """Add a learned vector for the language to the texts' features, in training only (LangSAMP)."""

    def __post_init__(self) -> None:
        if not 0 <= self.unimodal_weight < math.inf:
            raise ConfigError(f"unimodal_weight is {self.unimodal_weight}; expected at least 0")


@dataclass(frozen=True, kw_only=True)
class AdaptationConfig:
    """Locked towers, low-rank adapters, dropped patches, and activations computed again."""

    image_unlocked_groups: int | None = None
    """Number of last stages of the image tower to train; 0 locks it (LiT), null trains it all."""
    text_unlocked_groups: int | None = None
    """Number of last stages of the text tower to train; 0 locks it, null trains it all."""
    lora_rank: int = 0
    """Rank of the adapters that are trained instead of the towers; 0 for no adapters."""
    lora_alpha: int = 16
    """Scale of the adapters, at least 1; they act with `lora_alpha / lora_rank`."""
    lora_towers: tuple[Literal["image", "text"], ...] = ("image", "text")
    """The towers that have adapters; the other is trained whole, unless it is locked."""
    patch_dropout: float = 0.0
    """Ratio in [0, 1) of an image's patches left out in training (FLIP); not with masked models."""
    grad_checkpointing: Literal["none", "blocks", "selective"] = "none"
    """What the towers' blocks compute again in the backward pass.

    `blocks` is everything: least memory, about a third more time. `selective` keeps the outputs of
    matrix products, convolutions and attention: some of the memory, a few percent more time.
    """
    grad_checkpointing_every: int = 1
    """Compute every n-th block again, counted from the first."""

    def __post_init__(self) -> None:
        if self.grad_checkpointing_every < 1:
            raise ConfigError(
                f"grad_checkpointing_every is {self.grad_checkpointing_every}; expected at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """Averages of the weights, scored next to them and left as bundles of their own."""

    ema_decay: float | None = None
    """Decay of an exponential moving average, in [0, 1), such as 0.999; null for none."""
    last_checkpoints: int = 0
    """Number of the last checkpoints whose mean is taken, at most `checkpoint.keep`; 0 for none."""

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(
                f"averaging: ema_decay is {self.ema_decay}; expected null, or 0 to less than 1"
            )
        if self.last_checkpoints < 0:
            raise ConfigError(
                f"averaging: last_checkpoints is {self.last_checkpoints}; expected at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When the update of a step is skipped, on all ranks, and when the run ends for it.

    It is skipped where the loss or the gradient is not finite on any rank.
    """

    max_skipped_in_a_row: int = 10
    """Number of updates skipped in a row that ends the run."""
    spike_sigmas: float | None = None
    """Also skip an update whose loss or gradient norm lies more than this number of standard
    deviations above the mean of the last steps; 6 is usual, null is never."""
    spike_window: int = 128
    """Number of last steps that are looked back on; the first half of them is not judged."""

    def __post_init__(self) -> None:
        if self.spike_window < 4 or not (self.spike_sigmas is None or self.spike_sigmas > 0):
            raise ConfigError(
                f"guard: spike_sigmas is {self.spike_sigmas} and spike_window {self.spike_window}; "
                "expected null or more than 0, and at least 4"
            )
        if self.max_skipped_in_a_row < 1:
            raise ConfigError(
                f"guard.max_skipped_in_a_row is {self.max_skipped_in_a_row}; expected at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Retrieval scores during the run."""

    every_steps: int = 0
    """Steps between evaluations, with one at the end; 0 for none."""
    folder: str | Path | None = None
    """The data folder to score; by default the run's, where that is one with such a split."""
    split: str = "val"
    """The split of it to score."""
    languages: tuple[str, ...] = ()
    """Languages to score in; by default those of the captions and those that the bundle of
    `start_from` knows, so that what a run forgets is seen."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run to resume it."""

    every_steps: int = 500
    """Steps between checkpoints, with one at the end; 0 for none."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int = 0
    """Steps between checkpoints that are never removed, a multiple of `every_steps`; 0 for none."""
    in_background: bool = False
    """Write while training goes on, from a copy of the state in the memory of each host."""

    def __post_init__(self) -> None:
        if self.keep_every < 0 or self.keep_every % max(self.every_steps, 1):
            raise ConfigError(
                f"checkpoint: keep_every is {self.keep_every} and every_steps {self.every_steps}; "
                "expected a multiple, or 0"
            )
        if self.every_steps < 0 or self.keep < 1:
            raise ConfigError(
                f"checkpoint: every_steps is {self.every_steps} and keep {self.keep}; "
                "expected at least 0 and at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where a run is to take place, for the plan that a dry run prints."""

    world: int | None = None
    """For a dry run: number of processes, one a device; null for those that were launched."""
    ranks_per_node: int | None = None
    """For a dry run: processes of a machine; null for those that were launched, else 8."""
    sharding: Literal["none", "full", "hybrid"] | None = None
    """For a dry run: weights whole on every device (none), or divided by FSDP2 over all of them
    (full) or over those of each machine (hybrid); null for what was launched."""
    mfu: float = 0.4
    """For a dry run: ratio of a device's peak that training reaches (model FLOP utilisation)."""
    peak_tflops: float = 989.0
    """For a dry run: peak of a device in TFLOP/s; 989 is an H100's in bfloat16."""

    def __post_init__(self) -> None:
        for name in ("world", "ranks_per_node"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 < self.mfu <= 1 or not self.peak_tflops > 0:
            raise ConfigError(
                f"mfu is {self.mfu} and peak_tflops {self.peak_tflops}; expected a ratio in (0, 1] "
                "and more than 0"
            )
        if self.sharding == "hybrid" and self.ranks % self.node:
            raise ConfigError(
                f"sharding is hybrid for {self.ranks} ranks, {self.node} a machine; expected whole "
                "machines"
            )

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.world or int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def node(self) -> int:
        """The number of processes of a machine."""
        launched = int(os.environ.get("LOCAL_WORLD_SIZE", "8"))
        return min(self.ranks_per_node or launched, self.ranks)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps are traced, to see what they spend time and memory on."""

    steps: str | None = None
    """First and last step to trace, counted from 1, such as 10:12, in YAML "10:12"; null for none.
    They are slower, and a trace of more than a few is large."""
    ranks: tuple[int, ...] = (0,)
    """The processes that are traced."""

    def __post_init__(self) -> None:
        if self.steps is None:
            return
        first, last = self.first_and_last or (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(
                f"profile.steps is {self.steps}; expected FIRST:LAST, a first step of at least 1 "
                "and a last one that is not before it"
            )

    @property
    def first_and_last(self) -> tuple[int, int] | None:
        """The steps as numbers; None without any."""
        found = re.fullmatch(r"(\d+):(\d+)", self.steps or "")
        return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; a YAML file states what differs from the defaults."""

    run_folder: Path = Path("runs/train")
    """Folder for the run's bundle, checkpoints, metrics and resolved configuration."""
    seed: int = 0
    """Seed of the initial weights, the order of samples, the choice of captions, augmentation."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the towers; features, loss and weights are float32 in any case.

    `fp16` scales the loss, and skips steps while it searches for the scale; `bf16` needs neither.
    """
    compile: bool = False
    """Compile the towers' blocks (`torch.compile`): minutes at the start, then quicker steps."""
    cpu_threads: int = 0
    """CPU threads of each process; 0 leaves the choice to torch.

    A small model is hardly faster with more, and much slower where others use the machine.
    """
    parallel_towers: bool = False
    """Run the text tower in a thread of its own, next to the image tower: for a small model and
    `cpu_threads` of 1. It changes no result, and nothing in several processes or on a GPU."""
    start_from: Path | None = None
    """Bundle to start from: its model, tokenizer and image transform, instead of `model`,
    `tokenizer` and `preprocess`. The optimizer and the schedule start anew."""
    tokenizer: Path = Path("tokenizers/emoji-zh-en")
    """A tokenizer folder."""
    report_every: int = 10
    """Steps between two records in `metrics.jsonl`."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ("tensorboard",)
    """Where the records go as well; all but TensorBoard need a package of their name, and each
    writes where its own settings say, which may be a server."""
    deterministic: bool = False
    """Use only operations that give the same bits each time, also on a GPU: slower, and an error
    where there is none."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    data: DataConfig = field(default_factory=DataConfig)
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    adapt: AdaptationConfig = field(default_factory=AdaptationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    stages: tuple[StageConfig, ...] = ()
    """What is trained one after the other, each with a schedule of its own; none is one stage."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        for name, every in (
            ("report_every", self.report_every),
            ("evaluation.every_steps", self.evaluation.every_steps),
        ):
            if every < 0:
                raise ConfigError(f"{name} is {every}; expected at least 0, which is never")
        first, _ = self.profile.first_and_last or (0, 0)
        if first > self.schedule.steps:
            raise ConfigError(
                f"profile.steps is {self.profile.steps} in a run of {self.schedule.steps} steps; "
                "expected a first step that it takes"
            )
        kept = self.checkpoint.keep if self.checkpoint.every_steps else 0
        if self.averaging.last_checkpoints > kept:
            raise ConfigError(
                f"averaging.last_checkpoints is {self.averaging.last_checkpoints}, and {kept} are "
                "kept; expected checkpoint.every_steps above 0, and at least as many in "
                "checkpoint.keep"
            )
        weighted = [stage.weights for stage in self.whole_stages if stage.weights is not None]
        if weighted and self.data.mixture.schedule:
            raise ConfigError(
                "found weights of sources both in stages and in the schedule of the mixture; "
                "expected them in one of the two"
            )
        for weights in weighted:
            self.data.check_names(weights, "a stage")

    @property
    def whole_stages(self) -> tuple[WholeStage, ...]:
        """The stages with everything filled in that they leave to the run; at least one."""
        return whole_stages(self.stages, self.schedule, self.optimizer.learning_rate)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The number of samples that all processes read in one step, in each stage."""
        return tuple(stage.batch_size or self.data.batch_size for stage in self.whole_stages)

    @property
    def samples(self) -> int:
        """The number of samples that the run reads."""
        return self.samples_after(0)

    def samples_after(self, step: int) -> int:
        """Return the number of samples that the run reads after some steps."""
        return sum(
            size * min(max(stage.end - step, 0), stage.steps)
            for size, stage in zip(self.batch_sizes, self.whole_stages, strict=True)
        )

    def stage_at(self, step: int) -> WholeStage:
        """Return the stage of a step, counted from 0; after the last step, the last stage."""
        stages = self.whole_stages
        return next((stage for stage in stages if step < stage.end), stages[-1])


def config_as_plain(config: TrainConfig) -> dict[str, Any]:
    """Return the whole configuration as dictionaries, lists, numbers and strings."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def config_as_yaml(config: TrainConfig) -> str:
    """Return the whole configuration as YAML that `vlm train --config` reads."""
    return yaml.safe_dump(config_as_plain(config), sort_keys=False, allow_unicode=True)


def flat_settings(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return settings as YAML nests them by their dotted names."""
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _plain(value: Any) -> Any:
    """Turn paths into strings and tuples into lists, at every depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
