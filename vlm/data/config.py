"""What a training run reads: a data folder, and which captions of its samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """The weights of sources in one part of a run."""

    until: int | None = None
    """The step that this part ends before; null for the last part."""
    weights: Mapping[str, float]
    """By the name of a source, its share of the samples of a step relative to the others; one that
    is not named is not read."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How samples of several sources come together."""

    schedule: tuple[PhaseConfig, ...] = ()
    """Weights that change with the step, instead of those of the sources."""
    batch_by: Literal["sample", "source"] = "sample"
    """What the weights are shares of: the samples of each batch, or batches of one source each."""

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.schedule]
        inner = [end for end in ends[:-1] if end is not None]
        if ends and (ends[-1] is not None or inner != ends[:-1] or sorted(set(inner)) != inner):
            raise ConfigError(
                f"the schedule of the mixture ends its parts at {ends}; expected steps that "
                "increase, and null for the last"
            )
        for phase in self.schedule:
            weights = phase.weights.values()
            if not sum(weights) > 0 or min(weights) < 0:
                raise ConfigError(
                    f"the schedule of the mixture has the weights {dict(phase.weights)}; expected "
                    "none below 0, and one above"
                )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images and captions of a run."""

    folder: Path = Path("data/emoji")
    """A data folder with a manifest."""
    split: str = "train"
    """The split of the folder to train on."""
    batch_size: int = 256
    """Samples in one step, summed over all processes."""
    workers: int = 2
    """Processes that decode images, for each training process; 0 decodes in that process."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    skip_batches: tuple[tuple[int, int], ...] = ()
    """First and last numbers of batches to pass over, counted from 0: such as those that a loss has
    diverged at."""
    streams: int = 0
    """Canonical streams that read the data, which fix its order for the whole run; 0 for one a
    node."""
    allowed_share: float = 0.001
    """Ratio of the last 100,000 samples that may be unusable, and replaced by others; beyond it
    the run ends."""
    keep_decoded: bool = False
    """Keep decoded images in memory: for many epochs over few small images."""

    def __post_init__(self) -> None:
        if not 0 <= self.allowed_share <= 1:
            raise ConfigError(f"allowed_share is {self.allowed_share}; expected a ratio in [0, 1]")
        if any(not 0 <= first <= last for first, last in self.skip_batches):
            raise ConfigError(
                f"skip_batches is {self.skip_batches}; expected pairs of a first number from 0 and "
                "a last one that is no smaller"
            )


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Which captions of a sample a training step reads."""

    languages: tuple[str, ...] = ("zh", "en")
    """One caption of each is read in every step."""
    main_ratio: float = 0.5
    """Probability of the main caption where a sample has others as well, in [0, 1]."""
    second: bool = False
    """Read one of the other captions of each language as well: a term of its own in the loss."""

    def __post_init__(self) -> None:
        if not self.languages or not 0 <= self.main_ratio <= 1:
            raise ConfigError(
                f"captions: languages is {self.languages} and main_ratio {self.main_ratio}; "
                "expected at least one language and a ratio in [0, 1]"
            )
