"""What a training run reads: a data folder, and which captions of its samples."""

from dataclasses import dataclass
from pathlib import Path

from vlm.errors import ConfigError


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
