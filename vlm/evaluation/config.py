"""What can be set of an evaluation: where a benchmark lies and how it is asked."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vlm.data.config import DEFAULT_SPLIT, SourceConfig, SourceFields
from vlm.errors import ConfigError
from vlm.storage.places import shown

DuplicatePolicy = Literal["by id", "by string"]
"""Which images are correct answers where several of them have the same caption."""

Kind = Literal[
    "chinese-clip", "m2-encoder", "karpathy", "numbered-captions", "xm3600", "xtd10", "webdataset",
    "table", "source",
]  # fmt: skip
"""What can be asked caption by caption: the kinds of benchmark files, and any other source."""

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class SourceSettings(SourceFields):
    """How a benchmark is asked; a setting that is not given takes what fits the files."""

    split: str | None = None
    """By default the only one, else of a data folder `test_style`, of a benchmark `test`, of
    another source `train`."""
    images: Path | None = None
    """Of a benchmark or a table: the folder of its images, if they are not next to its file."""
    language: str | None = None
    """Of a benchmark: the language of captions whose file does not name it; by default recognised
    from their letters."""
    languages: Sequence[str] | None = None
    """Languages to ask in; by default all, of a data folder those of the model."""
    where: Sequence[str] | None = None
    """Of a data folder or another source: conditions on samples, such as `source=noto` or
    `group!=flags`."""
    duplicates: DuplicatePolicy | None = None
    """Of a benchmark: which images are correct where several have the same caption; by default
    `by id`. `by string` is M2-Encoder's rule in text to image; in image to text its script counts
    only the last of equal captions as correct, here all are."""
    lower_case: bool | None = None
    """Of a benchmark: captions in lower case, as Chinese-CLIP and M2-Encoder evaluate."""
    allowed_share: float | None = None
    """Of a benchmark: ratio of images and captions that may be missing or damaged; by default
    0.01."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allowed_share is not None and not 0 <= self.allowed_share <= 1:
            raise ConfigError(f"allowed_share is {self.allowed_share}; expected a ratio in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(SourceSettings):
    """How a benchmark is asked, and what it is compared with."""

    pixels: str | None = None
    """Of a data folder: the split with whose images raw pixels are compared, such as `train`: a
    baseline next to the model's scores."""
    questions: Path | None = None
    """Of a data folder: YAML file of everyday questions to ask as well, each with the concepts that
    answer it."""
    part: str | None = None
    """Which part of the questions to ask; by default `report`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part and not self.questions:
            raise ConfigError(f"found part {self.part!r} without questions; expected their file")


@dataclass(frozen=True, kw_only=True)
class RetrievalSource(RetrievalSettings):
    """A benchmark and how to ask it."""

    path: str
    """A data folder, the file or folder of a published benchmark, or any other source of images
    with captions, here or at a URL."""
    name: str = ""
    """The name its scores get; by default a data folder's split, or the name of the file."""
    kind: Kind | None = None
    """The kind of files, if it cannot be recognised."""

    @property
    def file(self) -> Path:
        """The path of what lies on this machine."""
        return Path(self.path.removeprefix("file://"))

    def config(self) -> SourceConfig:
        """Return the source that is asked, as training has it."""
        return SourceConfig(
            path=self.path,
            split=self.split or DEFAULT_SPLIT,
            images=self.images,
            where=tuple(self.where or ()),
            **{each.name: getattr(self, each.name) for each in fields(SourceFields)},
        )

    def as_record(self) -> dict[str, Any]:
        """Return the settings as plain values, for JSON; None for what was not given."""
        record = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
        }
        not_given = {each.name: None for each in fields(SourceFields) if not record[each.name]}
        return record | not_given | {"path": shown(self.path)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationSource:
    """Labelled images, the names of their classes and the prompts to classify them with."""

    data: str | None = None
    """Data folder, here or at a URL, or another source whose samples have labels; default:
    data/emoji."""
    split: str | None = None
    """Split of the data; default: the only one or test_style of a data folder, train of others."""
    label: str | None = None
    """Label that names a sample's class; default: class."""
    where: Sequence[str] | None = None
    """Conditions on samples, such as `source=noto` or `group!=flags`."""
    images: Path | None = None
    """Folder with a folder of images for each class (instead of `data`)."""
    classes: Sequence[str] | None = None
    """Class names: a JSON or YAML file by class, or a text file with one name a line in the order
    of the sorted folders; `LANGUAGE=FILE` for each language; default: the data folder's
    classes.json."""
    templates: str = "general"
    """Prompts: `general`, `drawings`, `name`, or a YAML or JSON file with lists by language."""
    languages: Sequence[str] | None = None
    """Languages of the class names; default: the model's."""

    def __post_init__(self) -> None:
        if self.images is None:
            return
        samples = ("data", "split", "label", "where")
        given = [f"--{name}" for name in samples if getattr(self, name) is not None]
        if given:
            raise ConfigError(
                f"--images {self.images} is a folder of images by class; found "
                f"{' and '.join(given)}, for data folders only"
            )
        if not self.classes:
            raise ConfigError(f"--images {self.images} needs --classes: the names of its classes")

    def config(self) -> SourceConfig:
        """Return the source of the samples, with the defaults of a data folder."""
        return SourceConfig(
            path="data/emoji" if self.data is None else self.data,
            split=self.split or "test_style",
            where=tuple(self.where or ()),
        )

    def as_record(self) -> dict[str, Any]:
        """Return which images are asked for, with the defaults, as plain values."""
        if self.images is not None:
            return {"data": str(self.images), "where": []}
        config = self.config()
        return {
            "data": shown(config.path),
            "split": config.split,
            "label": self.label or "class",
            "where": list(config.where),
        }


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """What a calibration aims at, and on how many pairs it is fitted."""

    prior: float = 0.5
    """Ratio of matching pairs among those whose probability will be asked for."""
    precision: float = 0.9
    """Precision that the threshold must reach, at the prior."""
    most_wrong: int = 1_000_000
    """About how many wrong pairs of a language to sample; all if there are fewer."""
    seed: int = 0
    """Seed of the split into halves and of the sample of wrong pairs."""

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ConfigError(f"the prior is {self.prior}; expected a number between 0 and 1")
        if not 0 < self.precision <= 1:
            raise ConfigError(
                f"the precision is {self.precision}; expected a number above 0, at most 1"
            )
        for name, value, least in (("most_wrong", self.most_wrong, 1), ("seed", self.seed, 0)):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexPlan:
    """Which indexes to compare with exact search."""

    factories: Sequence[str] = ("auto",)
    """Strings for FAISS's index_factory such as HNSW32 or IVF64,SQ8, with @nprobe=8 where a
    parameter is not to be tuned; auto is chosen by size, memory and recall."""
    target_recall: float = 0.95
    """Share of the ten nearest neighbours to which search parameters are tuned."""
    memory: str = "1GiB"
    """What an index chosen by auto may take, such as 512MiB or 2GB."""
    sweep: bool = False
    """Also measure each index over its search parameter."""

    def __post_init__(self) -> None:
        if not self.factories:
            raise ConfigError("no index is to be compared; expected some, such as auto")
        if not 0 < self.target_recall <= 1:
            raise ConfigError(
                f"target_recall is {self.target_recall}; expected more than 0 and up to 1"
            )
        _ = self.memory_bytes  # a size that cannot be read is refused before anything is embedded

    @property
    def memory_bytes(self) -> int:
        """The memory as a number.

        Raises:
            ConfigError: it is not a size.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", self.memory.strip(), re.IGNORECASE)
        count = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
        if not count:
            raise ConfigError(
                f"memory is {self.memory!r}; expected a number of bytes above 0, or one with KB, "
                "MB, GB, KiB, MiB or GiB, such as 512MiB"
            )
        return count
