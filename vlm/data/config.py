"""Where images with captions lie, and what their parts are called there."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm.errors import ConfigError

Verify = Literal["once", "each_open", "size"]
"""When a shard's SHA-256 is compared with its manifest: once on a machine, whenever it is opened,
or only before an index is made of it; its size always is."""
CACHE_GIB = 100.0
"""Of the cache folder's disk, what copies of remote files may take."""
DEFAULT_SPLIT = "train"
"""Also what is asked of a source without splits."""

_LANGUAGE = re.compile(r"[a-z]{2,3}([-_]\w+)*")


@dataclass(frozen=True, kw_only=True)
class SourceFields:
    """What the parts of a source are called there."""

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

    def __post_init__(self) -> None:
        for language, fields in self.captions.items():
            if not _LANGUAGE.fullmatch(language):
                raise ConfigError(
                    f"captions has the language {language!r}; expected a code such as zh or en"
                )
            if isinstance(fields, str):
                raise ConfigError(f"captions.{language} is {fields!r}; expected a list of fields")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(SourceFields):
    """Where images with captions lie, and what their parts are called there."""

    path: str
    """A data folder; tars, named by braces (`{00000..00299}.tar`), `*` or their folder; a csv,
    tsv, jsonl or parquet file with images or their paths; or a folder of images, each with a
    `.txt` or `.json` of the same name. Data folders, tars and tables with images may be at a place:
    `s3://`, `gs://`, `hf://`, `https://`."""
    split: str = DEFAULT_SPLIT
    """The split to read: of a data folder, of files named `SPLIT-NUMBER`, or of a table with a
    column `split`."""
    images: Path | None = None
    """The folder that relative paths in a table start from; null is the folder of the table."""
    where: tuple[str, ...] = ()
    """Conditions on samples, such as `source=noto`, `group!=flags` or `languages=en+zh`."""
