"""What a training run reads: its sources, how they are mixed, and which captions of a sample."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from vlm.data.config import CACHE_GIB, DEFAULT_SPLIT, SourceConfig, Verify
from vlm.errors import ConfigError
from vlm.storage.places import shown

_FOLDER = "data/emoji"
SLOT = re.compile(r"\{([\w-]*)\}")
"""Where a template has a caption; what it captures is the language, empty for the template's."""


@dataclass(frozen=True, kw_only=True)
class MixedSourceConfig(SourceConfig):
    """A source next to others."""

    name: str = ""
    """Names the source where there are several; by default the last part of its path."""
    weight: float | None = None
    """Share of the samples of a step, relative to the other sources; null, for all of them, is the
    size."""
    languages: tuple[str, ...] = ()
    """Languages of its captions that are read, of those of the run; none for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None and not self.weight > 0:
            raise ConfigError(f"weight is {self.weight}; expected more than 0")


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
    batch_by: str = ""
    """What a batch has one of or few, so that its samples are hard to tell apart: `source`, one a
    batch, or a label of the samples, such as a cluster. Empty for random samples."""

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.schedule]
        inner = [end for end in ends[:-1] if end is not None]
        if ends and (ends[-1] is not None or inner != ends[:-1] or sorted(set(inner)) != inner):
            raise ConfigError(
                f"the schedule of the mixture ends its parts at {ends}; expected steps that "
                "increase, and null for the last"
            )
        for phase in self.schedule:
            check_weights(phase.weights, "the schedule of the mixture")


def check_weights(weights: Mapping[str, float], what: str) -> None:
    """Refuse weights of sources by which nothing can be drawn."""
    if not sum(weights.values()) > 0 or min(weights.values()) < 0:
        raise ConfigError(
            f"{what} has the weights {dict(weights)}; expected none below 0, and one above"
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images and captions of a run."""

    folder: str | Path = _FOLDER
    """The source to train on, where there is one: a data folder, tars, a table, ..., as the path of
    a source."""
    split: str = DEFAULT_SPLIT
    """The split of it to train on."""
    sources: tuple[MixedSourceConfig | str, ...] = ()
    """Several sources to train on, instead of `folder` and `split`; one may be a path alone."""
    batch_size: int = 256
    """Samples in one step, summed over all processes."""
    workers: int = 2
    """Processes that decode images, for each training process; 0 decodes in that process."""
    verify: Verify = "once"
    """When the SHA-256 of a data folder's shards is compared with its manifest: `once` on a
    machine, at `each_open`, or only before an index is made of it (`size`). Sizes always are."""
    cache_gib: float = CACHE_GIB
    """Disk space of a node, in GiB, for copies of shards at a place, in the folder `shards` of the
    cache folder (`VLM_CACHE`). Those that make room are gone once no process reads them."""
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
    stall_s: float = 60.0
    """Seconds after which a worker that neither runs nor wakes ends the run, if a batch is
    missing."""
    keep_decoded: bool = False
    """Keep samples and their decoded images in memory: for many epochs over few small images."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0), ("streams", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.sources and str(self.folder) != _FOLDER:
            raise ConfigError(
                f"found both the folder {self.folder} and sources; expected all in `sources`"
            )
        if not self.stall_s > 0:
            raise ConfigError(f"stall_s is {self.stall_s}; expected more than 0")
        if not self.cache_gib > 0:
            raise ConfigError(f"cache_gib is {self.cache_gib}; expected more than 0")
        if not 0 <= self.allowed_share <= 1:
            raise ConfigError(f"allowed_share is {self.allowed_share}; expected a ratio in [0, 1]")
        if any(not 0 <= first <= last for first, last in self.skip_batches):
            raise ConfigError(
                f"skip_batches is {self.skip_batches}; expected pairs of a first number from 0 and "
                "a last one that is no smaller"
            )
        if str(self.folder).startswith("["):
            raise ConfigError(f"folder is {self.folder}; expected `sources` for several of them")
        self._check_mixture()

    def _check_mixture(self) -> None:
        """Refuse weights that do not fit the sources."""
        if len({source.weight is None for source in self.mixed}) > 1:
            raise ConfigError("some sources have a weight; expected one for each or for none")
        weighted = [name for phase in self.mixture.schedule for name in phase.weights]
        self.check_names(weighted, "the schedule of the mixture")

    def check_names(self, names: Iterable[str], what: str) -> None:
        """Refuse weights of sources that are not there."""
        known = list(self.by_name)
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(
                f"{what} has weights of {', '.join(unknown)}; expected those of {', '.join(known)}"
            )

    @property
    def mixed(self) -> tuple[MixedSourceConfig, ...]:
        """The several sources, each with its settings."""
        return tuple(
            MixedSourceConfig(path=each) if isinstance(each, str) else each for each in self.sources
        )

    @property
    def by_name(self) -> dict[str, MixedSourceConfig]:
        """The sources by their names; a single one is `data`."""
        if not self.sources:
            return {"data": MixedSourceConfig(path=str(self.folder), split=self.split)}
        found: dict[str, MixedSourceConfig] = {}
        for source in self.mixed:
            name = source.name or Path(shown(source.path)).name
            if name in found:
                raise ConfigError(f"two sources are called {name!r}; expected a `name` for each")
            found[name] = source
        return found


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Which captions of a sample a training step reads."""

    languages: tuple[str, ...] = ("zh", "en")
    """One caption of each is read in every step."""
    main_ratio: float = 0.5
    """Probability of the main caption where a sample has others as well, in [0, 1]."""
    second: bool = False
    """Read one of the other captions of each language as well: a term of its own in the loss."""
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By language, sentences that are filled with captions of a sample where these are names and
    keywords: `a picture of a {}`, `{} and {}`, or with one of another language, `a picture of
    {zh}`. Those of a language that is not read are not used."""
    composed_ratio: float = 0.5
    """Probability that a caption other than the main one is composed by a template, in [0, 1]."""

    def __post_init__(self) -> None:
        once = len(set(self.languages)) == len(self.languages) > 0
        if not once or not 0 <= self.main_ratio <= 1:
            raise ConfigError(
                f"captions: languages is {self.languages} and main_ratio {self.main_ratio}; "
                "expected at least one language, each once, and a ratio in [0, 1]"
            )
        if not 0 <= self.composed_ratio <= 1:
            raise ConfigError(
                f"composed_ratio is {self.composed_ratio}; expected a ratio in [0, 1]"
            )
        known = {"", *self.languages, *self.templates}
        for template in chain.from_iterable(self.templates.values()):
            slots = SLOT.findall(template)
            if not slots or not known >= set(slots):
                raise ConfigError(
                    f"the template {template!r} has no place for a caption; expected {{}}, or "
                    f"{{LANGUAGE}} with one of {', '.join(self.languages)}"
                )
