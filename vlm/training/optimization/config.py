"""By which optimizer, how fast and in which stages a run trains: the settings of that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from vlm.batches.config import check_weights
from vlm.errors import ConfigError

Trained = Literal["all", "text", "image", "new_rows"]

_LARGEST_BFLOAT16_BETA = 0.98
"""Rounding to bfloat16 swallows changes below 2^-9 to 2^-8 of a number. Where gradients had shrunk
tenfold, the root of a second moment was measured at 0.9995 of its value in float32 with a beta of
0.98, and at 1.67 of it with 0.999 (1,000 steps of normal gradients)."""


@dataclass(frozen=True, kw_only=True)
class TowerRateConfig:
    """How one tower is trained where it differs from the rest of the model."""

    learning_rate_ratio: float = 1.0
    """Ratio of its learning rate to the model's; SigLIP trains a pretrained tower at 0.1."""
    weight_decay: float | None = None
    """Decay of its matrices and kernels, 0 in SigLIP's pretrained towers; null for the model's."""
    layer_decay: float = 1.0
    """Ratio of a stage's learning rate to that of the stage after it, in (0, 1]; the last stage,
    which holds the projection, has the tower's."""

    def __post_init__(self) -> None:
        if not 0 <= self.learning_rate_ratio < math.inf or not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"learning_rate_ratio is {self.learning_rate_ratio} and layer_decay "
                f"{self.layer_decay}; expected at least 0, and more than 0 up to 1"
            )
        if self.weight_decay is not None:
            _check_at_least_0(self, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, and the rates at which parts of the model are trained."""

    name: Literal["adamw", "muon", "lion"] = "adamw"
    """`adamw` (Loshchilov and Hutter 2019); `muon` (Jordan et al. 2024) for the towers' matrices
    and convolutions, and AdamW for embeddings and all else; or `lion` (Chen et al. 2023), which
    needs half of AdamW's memory, a learning rate 3 to 10 times lower and a weight decay as much
    higher."""
    learning_rate: float = 1e-3
    """The highest rate, reached after warm-up."""
    weight_decay: float = 0.1
    """Decay of matrices and kernels; gains, biases and the temperature are left alone."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of AdamW's and Lion's moments; SigLIP lowers the second one to 0.95 against spikes of
    the loss. Muon's momentum is 0.95."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the moments between steps; `bfloat16` halves their memory, for betas up to 0.98."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    max_gradient_norm: float = 1.0
    """Gradients whose norm is larger are scaled down to it."""
    embedding_gradient_ratio: float = 1.0
    """Ratio in (0, 1] of the gradient of each tower's first stage, its embeddings of tokens or
    patches, that is kept: 0.1 calms a loss that spikes (GLM-130B: Zeng et al. 2023)."""
    image: TowerRateConfig = field(default_factory=TowerRateConfig)
    """The image tower with its projection. What both towers share gets the lower rate and decay."""
    text: TowerRateConfig = field(default_factory=TowerRateConfig)
    """The text tower with its projection."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "eps"):
            _check_at_least_0(self, name)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer: betas is {self.betas}; expected two in [0, 1)")
        if self.state_dtype == "bfloat16" and max(self.betas) > _LARGEST_BFLOAT16_BETA:
            raise ConfigError(
                f"optimizer: state_dtype is bfloat16 and betas {self.betas}; expected betas of at "
                f"most {_LARGEST_BFLOAT16_BETA}, since slower moments lose their changes when they "
                "are rounded"
            )
        if not 0 < self.embedding_gradient_ratio <= 1:
            raise ConfigError(
                f"optimizer: embedding_gradient_ratio is {self.embedding_gradient_ratio}; expected "
                "more than 0, and at most 1"
            )
        if not self.max_gradient_norm > 0:
            raise ConfigError(
                f"optimizer: max_gradient_norm is {self.max_gradient_norm}; expected more than 0"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over the run: linear warm-up, then a decay."""

    steps: int = 1000
    """Length of the run, in optimizer steps."""
    warmup_steps: int = 100
    """Steps over which the rate rises to its highest."""
    shape: Literal["cosine", "linear", "wsd"] = "cosine"
    """The decay after warm-up: half a cosine (Loshchilov and Hutter 2017), a line (Bergsma et al.
    2025), or `wsd` (Hu et al. 2024): none at first, then 1 - sqrt(x) (Haegele et al. 2024)."""
    decay_steps: int | None = None
    """Steps of the decay at the end of a run of shape `wsd`; null for a fifth of its steps."""
    final_ratio: float = 0.0
    """Ratio of the last learning rate to the highest, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"schedule: steps is {self.steps}; expected at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps} in a schedule or stage of {self.steps} "
                "steps; expected at least 0, and fewer than the steps"
            )
        if not 0 <= self.final_ratio <= 1:
            raise ConfigError(f"schedule: final_ratio is {self.final_ratio}; expected 0 to 1")
        most = self.steps - self.warmup_steps
        if self.decay_steps is not None and not 0 < self.decay_steps <= most:
            raise ConfigError(
                f"schedule: decay_steps is {self.decay_steps}; expected 1 to {most}, the steps "
                "after warm-up"
            )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A part of a run: what it trains, how fast, and on what."""

    steps: int | None = None
    """Length in steps; null, for the last stage, is what the others leave of `schedule.steps`."""
    trained: Trained = "all"
    """What is trained of what `adapt` leaves unlocked: all; all but the image tower (`text`, LiT);
    all but the text tower (`image`); or only the embedding rows of new pieces, for a run that
    starts from a bundle with a grown vocabulary."""
    learning_rate: float | None = None
    """The highest rate; null is that of the optimizer. Every stage rises to its own, and falls."""
    warmup_steps: int | None = None
    """Steps over which the rate rises to its highest; null is the number in `schedule`."""
    goes_on: bool = False
    """Go on with the rates of the stage before, as if the two were one."""
    weights: Mapping[str, float] | None = None
    """By the name of a source, its share of the samples of a step relative to the others; one that
    is not named is not read. Null for the weights of the sources."""
    batch_size: int | None = None
    """Samples that all processes together read in one step; null for `data.batch_size`."""
    image_size: int | None = None
    """Pixels a side of the images; null for the model's size, at which it is scored as ever."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "image_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"a stage has {name} {value}; expected at least 1")
        if self.goes_on and (self.learning_rate, self.warmup_steps) != (None, None):
            raise ConfigError(
                "a stage has goes_on true, and learning_rate or warmup_steps; expected these null"
            )
        if self.weights is not None:
            check_weights(self.weights, "a stage")


@dataclass(frozen=True, kw_only=True)
class WholeStage:
    """A stage with everything filled in."""

    first: int
    """The step that it begins at, counted from 0."""
    steps: int
    trained: Trained
    learning_rate: float
    """The highest."""
    rises_at: int
    """The step from which its schedule is counted."""
    schedule: ScheduleConfig
    """Of its steps, and of those of its neighbours that share it."""
    weights: Mapping[str, float] | None
    batch_size: int | None
    image_size: int | None

    @property
    def end(self) -> int:
        """The step that it ends before."""
        return self.first + self.steps


def whole_stages(
    stages: Sequence[StageConfig], schedule: ScheduleConfig, learning_rate: float
) -> tuple[WholeStage, ...]:
    """Return stages with everything filled in that they leave to a run; at least one."""
    stages, total = stages or (StageConfig(),), schedule.steps
    given = [stage.steps for stage in stages]
    lengths = [steps or 0 for steps in given]
    if given[-1] is None:
        lengths[-1] = total - sum(lengths)
    if min(lengths) < 1 or sum(lengths) != total:
        raise ConfigError(
            f"the stages have {', '.join(map(str, given)).replace('None', 'null')} steps and "
            f"schedule.steps is {total}; expected {total} in all; the last may be null, which is "
            "what the others leave"
        )
    if stages[0].goes_on:
        raise ConfigError("the first stage has goes_on true, and nothing to go on from")
    begins = [number for number, stage in enumerate(stages) if not stage.goes_on] + [len(stages)]
    whole: list[WholeStage] = []
    for begin, end in pairwise(begins):
        rate, warmup = stages[begin].learning_rate, stages[begin].warmup_steps
        rises_at = sum(lengths[:begin])
        own = replace(
            schedule,
            steps=sum(lengths[begin:end]),
            warmup_steps=schedule.warmup_steps if warmup is None else warmup,
        )
        whole += [
            WholeStage(
                first=sum(lengths[:number]),
                steps=lengths[number],
                trained=stages[number].trained,
                learning_rate=learning_rate if rate is None else rate,
                rises_at=rises_at,
                schedule=own,
                weights=stages[number].weights,
                batch_size=stages[number].batch_size,
                image_size=stages[number].image_size,
            )
            for number in range(begin, end)
        ]
    return tuple(whole)


def _check_at_least_0(config: object, name: str) -> None:
    value = getattr(config, name)
    if not 0 <= value < math.inf:
        raise ConfigError(f"{name} is {value}; expected a number of at least 0")
