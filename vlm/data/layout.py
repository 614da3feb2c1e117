"""What a source's path or URL names: a data folder, tars, tables, or a folder of images."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vlm.data.config import DEFAULT_SPLIT, SourceConfig
from vlm.data.image_folder import OTHER_SUFFIX, images_below
from vlm.data.index import ROWS
from vlm.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, is_data_folder, read_manifest
from vlm.data.scanning import SIDE_SUFFIXES, image_column, is_json_lines
from vlm.errors import ConfigError, DataError
from vlm.records.tables import columns_of
from vlm.records.tars import TAR_SUFFIXES
from vlm.records.texts import first_object, listed
from vlm.storage.places import expand, is_remote, shown, state_of, within

Kind = Literal["data folder", "tars", "tables", "images"]
TABLE_SUFFIXES = (
    ".parquet", *(f".{name}{packed}" for name in ("csv", "tsv", "jsonl") for packed in ("", ".gz"))
)  # fmt: skip
_ASKED = 16  # files at a place whose states are asked for at a time
_NUMBERED = re.compile(r"(.+?)-\d+(?:-of-\d+.*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A file with samples, or a part of a folder with images, before it is opened."""

    path: str
    """The tar or table, as a path or a URL; of images, their folder."""
    prefix: str = ""
    """What stands before a key or a row to make it a uid."""
    entry: ShardEntry | None = None
    """What a manifest says of it."""
    images: Sequence[Path] = ()
    size: int
    """Bytes that are looked through for an index."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """What changes when the file is changed."""

    @property
    def is_tar(self) -> bool:
        """Whether its samples are members of a tar."""
        return _has_suffix(self.path, TAR_SUFFIXES)

    @property
    def is_remote(self) -> bool:
        """Whether it lies at a place, such as a bucket or a web server."""
        return is_remote(self.path)

    @property
    def name(self) -> str:
        """What errors call it."""
        return shown(self.path)


class NoSamplesError(DataError):
    """A folder holds no images with captions."""


class Layout(NamedTuple):
    """What a path holds."""

    kind: Kind
    files: Sequence[ShardFile]
    left_out: Mapping[str, int] = {}
    """How many entries of a folder are not taken, by the reason."""


def layout_of(config: SourceConfig) -> Layout:
    """Find what a source's path holds; only names and sizes are looked at.

    Raises:
        DataError: there is nothing, nothing of a known kind, or no such split.
        PlaceError: the place cannot be reached.
        ConfigError: a setting is not for what is there.
    """
    config = replace(config, path=config.path.removeprefix("file://"))
    path = shown(config.path)
    try:
        if has_manifest(config.path):
            manifest = read_manifest(config.path)
            entries = manifest.shards_of(config.split, path)
            if not is_remote(path):
                _check_all_listed(Path(path), manifest)
            layout = Layout("data folder", [_in_manifest(config.path, entry) for entry in entries])
        elif not is_remote(path) and Path(path).is_dir():
            layout = _layout_of_folder(Path(path), config)
        else:
            layout = _layout_of_files(config)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    given = [name for name in ("image", "images") if getattr(config, name)]
    if given and layout.kind != "tables":
        raise ConfigError(
            f"{path} is no table ({layout.kind}); found {' and '.join(given)}, which only tables "
            "have"
        )
    return layout


def splits_of(config: SourceConfig) -> list[str]:
    """Return the splits of a data folder; of anything else, the one that is asked for."""
    return list(read_manifest(config.path).splits) if has_manifest(config.path) else [config.split]


def tars_in(folder: Path) -> dict[str, list[Path]]:
    """Return the tars of a folder under '', or else those of its folders by their names.

    Those of a folder are in the order of their numbers; hidden ones are left out.
    """
    own = _visible(folder, "*", TAR_SUFFIXES)
    if own:
        return {"": own}
    found: dict[str, list[Path]] = {}
    for path in _visible(folder, "*/*", TAR_SUFFIXES):
        found.setdefault(path.parent.name, []).append(path)
    return found


def split_of(path: Path) -> str:
    """Return the split that a file's name says: `train` of `train-00000.tar` and of `00000.tar`.

    A table may be called by its split alone: `train.csv`.

    Raises:
        DataError: the name is not like one of these.
    """
    stem = path.name.partition(".")[0]
    if found := _NUMBERED.fullmatch(stem):
        return found[1]
    if stem.isdecimal():
        return "train"
    if path.name.lower().endswith(TABLE_SUFFIXES):
        return stem
    raise DataError(f"{path} belongs to no split; expected a name like train-00000.tar")


def default_split(path: str, preferred: str) -> str:
    """Return the split where none is named: of a data folder its only or the preferred one."""
    splits = splits_of(SourceConfig(path=path)) if has_manifest(path) else [DEFAULT_SPLIT]
    return splits[0] if len(splits) == 1 else preferred


def has_manifest(path: str) -> bool:
    """Say whether a path or URL is a data folder; what is no file at a place must be one."""
    if is_remote(path):
        return not _has_suffix(path, TAR_SUFFIXES + TABLE_SUFFIXES)
    return is_data_folder(Path(path.removeprefix("file://")))


def _check_all_listed(folder: Path, manifest: Manifest) -> None:
    """Refuse tars that came after the manifest: they would be left out in silence."""
    known = {entry.name for entries in manifest.splits.values() for entry in entries}
    names = (entry.name for entry in os.scandir(folder))
    tars = {n for n in names if n.lower().endswith(TAR_SUFFIXES) and not n.startswith(".")}
    if strange := sorted(tars - known):
        raise DataError(
            f"{folder} holds {listed(strange, 3)}, which its {MANIFEST_NAME} does not list; "
            f"expected `vlm data index {folder}` to have run since"
        )


def _in_manifest(folder: str, entry: ShardEntry) -> ShardFile:
    """Return a shard as the manifest of its folder, a path or a URL, lists it."""
    path = within(folder if is_remote(folder) else str(Path(folder)), entry.name)
    state = {"bytes": entry.bytes, "sha256": entry.sha256}
    return ShardFile(path=path, entry=entry, size=entry.bytes, state=state)


def _layout_of_files(config: SourceConfig) -> Layout:
    path = config.path
    if not (is_remote(path) or Path(path).exists() or set(path) & set("{*?[")):
        raise DataError(f"{path} is missing; expected a data folder, tars, tables or images")
    paths = sorted(expand(path), key=_by_number)
    kind: Kind = "tars" if _has_suffix(paths[0], TAR_SUFFIXES) else "tables"
    for file in paths:
        if not _has_suffix(file, TAR_SUFFIXES if kind == "tars" else TABLE_SUFFIXES):
            known = ", ".join((*TAR_SUFFIXES, *TABLE_SUFFIXES))
            raise DataError(
                f"{shown(file)} is no known kind of file; expected files of one of {known}"
            )
    if kind == "tars" and config.split != DEFAULT_SPLIT:
        raise DataError(f"{shown(path)} has no splits; found the split {config.split!r}")
    return Layout(kind, files_of(paths))


def _layout_of_folder(folder: Path, config: SourceConfig) -> Layout:
    if tars := tars_in(folder):
        splits = tars if "" not in tars else _by_split(tars[""])
        return Layout("tars", files_of(map(str, _chosen(splits, config, folder))))
    tables = _visible(folder, "*", TABLE_SUFFIXES)
    if not config.image:
        tables = [table for table in tables if _has_images(table)]
    if len(tables) > 1:
        tables = _chosen(_by_split(tables), config, folder)
    if tables:
        return Layout("tables", files_of(map(str, tables)))
    return _layout_of_images(folder, config.split)


def _layout_of_images(folder: Path, split: str) -> Layout:
    """Cut the images of a folder into shards, with the state of the captions next to them."""
    images, left_out = images_below(folder)
    if not images:
        raise NoSamplesError(
            f"{folder} holds no samples; expected a {MANIFEST_NAME}, tars, tables of images, or "
            "images with a .txt or .json of the same name"
        )
    if split != DEFAULT_SPLIT:
        raise DataError(f"{folder} has no splits; found the split {split!r}")
    files, captions = [], 0
    for start in range(0, len(images), ROWS):
        part, digest, size = images[start : start + ROWS], hashlib.sha256(), 0
        for path in part:
            digest.update(os.fsencode(path))
            for suffix in SIDE_SUFFIXES:
                with suppress(OSError):
                    found = os.stat(path.with_suffix(suffix))
                    digest.update(f"{suffix} {found.st_size} {found.st_mtime_ns}".encode())
                    size += found.st_size
                    captions += 1
        state = {"files": digest.hexdigest()}
        files.append(ShardFile(path=str(folder), images=part, size=size, state=state))
    if not captions:
        raise NoSamplesError(
            f"{folder} holds images without captions, such as {images[0].name}; expected "
            f"{images[0].with_suffix('.txt').name} or {images[0].with_suffix('.json').name}"
        )
    return Layout("images", files, left_out - Counter({OTHER_SUFFIX: captions}))


def files_of(paths: Iterable[str]) -> list[ShardFile]:
    """Return files with the state that they are in, and with prefixes that differ."""
    paths = [path if is_remote(path) else str(Path(path)) for path in paths]
    with ThreadPoolExecutor(_ASKED) as threads:
        ask = state_of if is_remote(paths[0]) else local_state
        states = list(threads.map(ask, paths))
    full = [Path(shown(path)).absolute() for path in paths]
    folder = os.path.commonpath([path.parent for path in full])
    files = []
    for path, place, state in zip(paths, full, states, strict=True):
        name = os.path.relpath(place, folder)
        tar = _has_suffix(path, TAR_SUFFIXES)
        prefix = f"{name.removesuffix('.gz').removesuffix('.tar')}/" if tar else f"{name}#"
        files.append(ShardFile(path=path, prefix=prefix, size=state["bytes"], state=state))
    return files


def local_state(path: str) -> dict[str, Any]:
    """Return what changes when a file of this machine is changed."""
    found = os.stat(path)
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def _has_suffix(path: str, suffixes: tuple[str, ...]) -> bool:
    return shown(path).lower().endswith(suffixes)


def _visible(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    found = (
        path
        for path in folder.glob(pattern)
        if path.name.lower().endswith(suffixes) and not path.name.startswith(".")
    )
    return sorted((path for path in found if path.is_file()), key=_by_number)


def _by_number(path: Path | str) -> tuple[str, int, str]:
    folder, _, name = str(path).rpartition("/")
    stem = name.partition(".")[0]
    return (folder, int(stem) if stem.isdecimal() else -1, name)


def _has_images(table: Path) -> bool:
    columns = first_object(table) if is_json_lines(table) else columns_of(table)
    return bool(image_column(columns))


def _by_split(paths: Iterable[Path]) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in paths:
        splits.setdefault(split_of(path), []).append(path)
    return splits


def _chosen(splits: Mapping[str, list[Path]], config: SourceConfig, folder: Path) -> list[Path]:
    if config.split not in splits:
        raise DataError(
            f"{folder} has no split {config.split!r}; its splits are {listed(sorted(splits))}"
        )
    return splits[config.split]
