"""What a training run reads: sources of images with captions, and which captions of a sample."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm.errors import ConfigError

Verify = Literal["once", "each_open", "size"]
"""When a shard's SHA-256 is compared with its manifest: once on a machine, whenever it is opened,
or never; its size always is."""
DEFAULT_SPLIT = "train"
"""Also what is asked of a source without splits."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where images with captions lie, and what their parts are called there."""

    path: str
    """A data folder; tars, named by braces (`{00000..00299}.tar`), `*` or their folder; a csv,
    tsv, jsonl or parquet file with images or their paths; or a folder of images, each with a
    `.txt` or `.json` of the same name."""
    split: str = DEFAULT_SPLIT
    """The split to read: of a data folder, of files named `SPLIT-NUMBER`, or of a table with a
    column `split`."""
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By language, the fields with its captions, the main one first: columns of a table, `txt` or
    `json.KEY` otherwise, dots lead further in. By default found by their names."""
    language_of: tuple[str, ...] = ()
    """Fields whose captions are in either language, Chinese or English, as their script says."""
    image: str = ""
    """Of a table, the column with images or their paths; by default found by its name."""
    concept: str = ""
    """The field with what an image shows: samples of one concept are never negatives of each other.
    By default `concept`, else the image's path, else the sample's name."""
    images: Path | None = None
    """The folder that relative paths in a table start from; null is the folder of the table."""
    where: tuple[str, ...] = ()
    """Conditions on samples, such as `source=noto`, `group!=flags` or `languages=en+zh`."""
    weight: float | None = None
    """Share of the samples of a step, relative to the other sources; null is the size."""

    def __post_init__(self) -> None:
        for language, fields in self.captions.items():
            if isinstance(fields, str):
                raise ConfigError(f"captions.{language} is {fields!r}; expected a list of fields")
        if self.weight is not None and not self.weight > 0:
            raise ConfigError(f"weight is {self.weight}; expected more than 0")


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
    keep_decoded: bool = False
    """Keep decoded images in memory: for many epochs over few small images."""


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
