"""`manifest.json`: what each split of a data folder holds, down to the bytes of every shard."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm.data.config import Verify
from vlm.errors import DataError, ShardError
from vlm.files import sha256_of, write_file
from vlm.storage.cache_folder import once
from vlm.storage.places import MissingFileError, is_remote, read_small, shown, within

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One shard as it was when it was written."""

    name: str
    samples: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Refuse, by a `ValueError`, what JSON may hold instead of a number."""
        for count in (self.samples, self.bytes):
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"{self.name} has {count!r} samples or bytes")

    def verify(self, path: Path, how: Verify = "once") -> None:
        """Compare a file's hash with the shard's; a `ShardError` if they differ.

        Once on a machine: that the file as it is now has the hash is remembered in the cache
        folder.
        """

        def compare() -> None:
            if (found := sha256_of(path)) != self.sha256:
                raise ShardError(
                    f"shard {path} is damaged: sha256 {found[:12]}, "
                    f"the manifest says {self.sha256[:12]}"
                )

        try:
            if how == "each_open":
                compare()
            elif how == "once":
                once(path, self.sha256, compare)
        except OSError as error:
            raise ShardError(f"shard {path} cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The shards of every split, in reading order."""

    splits: Mapping[str, tuple[ShardEntry, ...]]

    def shards_of(self, split: str, folder: Path | str) -> tuple[ShardEntry, ...]:
        """Return the shards of one split; a `DataError` if there is no such split."""
        if split not in self.splits:
            raise DataError(
                f"{folder} has no split {split!r}; its splits are {', '.join(self.splits)}"
            )
        return self.splits[split]


def is_data_folder(folder: Path) -> bool:
    """Say whether a path is a folder with a manifest."""
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path | str) -> Manifest:
    """Read the manifest of a data folder, a path or a URL.

    Raises:
        DataError: it is missing or not a manifest.
        PlaceError: the place refuses it or stays away.
    """
    path = within(str(folder), MANIFEST_NAME)
    name = shown(path)
    try:
        content = read_small(path) if is_remote(path) else Path(path).read_bytes()
    except MissingFileError as error:
        raise DataError(
            f"{name} is not there; expected a data folder, or tars by a pattern such as "
            f"{shown(within(str(folder), '{00000..00099}.tar'))}"
        ) from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if not Path(folder).is_dir():
            raise DataError(
                f"{folder} is not a folder; expected a data folder with a {MANIFEST_NAME}"
            ) from error
        raise DataError(
            f"{folder} has no {MANIFEST_NAME}; `vlm data index {folder}` writes one for its shards"
        ) from error
    try:
        record = json.loads(content)
        version = record["format"]
        splits = {
            split: tuple(ShardEntry(**entry) for entry in entries)
            for split, entries in record["splits"].items()
        }
        for split, entries in splits.items():
            if len({entry.name for entry in entries}) != len(entries):
                raise ValueError(f"the split {split!r} has a shard twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} is not a manifest: {error}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{name} has format {version}; this version reads format {FORMAT_VERSION}")
    return Manifest(splits=splits)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a data folder's manifest, the same bytes for the same manifest."""
    record = {"format": FORMAT_VERSION, **asdict(manifest)}
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    write_file(folder / MANIFEST_NAME, text.encode())
