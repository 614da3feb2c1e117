"""`TrainConfig`: everything a file in `configs/train` can say."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vlm.data.loader import CaptionConfig
from vlm.errors import ConfigError
from vlm.images.transforms import AugmentationConfig, PreprocessConfig
from vlm.losses.bilingual import LossConfig
from vlm.models.config import ModelConfig
from vlm.training.adaptation import AdaptationConfig
from vlm.training.objectives import ObjectivesConfig
from vlm.training.optimizer import OptimizerConfig
from vlm.training.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images and captions of a run."""

    folder: Path = Path("data/emoji")
    """A data folder with a manifest."""
    split: str = "train"
    """The split of the folder to train on."""
    batch_size: int = 256
    """Samples in one step, all processes together."""
    workers: int = 2
    """Processes that decode images, for each training process; 0 does it in that process."""
    keep_decoded: bool = False
    """Keep decoded images in each of those processes: for many epochs over few small ones."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Retrieval scores during the run."""

    every_steps: int = 0
    """Steps between evaluations, with one at the end; 0 is never."""
    split: str = "val"
    """The split of the run's data folder to score."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run to resume it."""

    every_steps: int = 500
    """Steps between checkpoints; 0 is never."""
    keep: int = 2
    """How many of the newest are kept."""

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep < 1:
            raise ConfigError(
                f"checkpoint: every_steps is {self.every_steps} and keep {self.keep}; "
                "expected at least 0 and at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; a YAML file states what differs from the defaults."""

    run_folder: Path = Path("runs/train")
    """Where the run leaves its bundle, checkpoints, metrics and resolved configuration."""
    seed: int = 0
    """Decides the first weights, the order of samples, captions and augmentation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the towers; features, loss and weights are float32 in any case."""
    cpu_threads: int = 0
    """Threads of a process's arithmetic on the CPU; 0 leaves the choice to torch.

    A small model is hardly faster with more, and much slower where others use the machine.
    """
    start_from: Path | None = None
    """A bundle to go on with, its model, tokenizer and image transform; `model`, `tokenizer` and
    `preprocess` are then left out. The optimizer and the schedule start anew."""
    tokenizer: Path = Path("tokenizers/emoji-zh-en")
    """A tokenizer folder."""
    report_every: int = 10
    """Steps between two records in `metrics.jsonl`."""
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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def config_as_yaml(config: TrainConfig) -> str:
    """Return the whole configuration as YAML that `vlm train --config` reads."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Turn paths into strings and tuples into lists, at every depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
