"""Open the benchmarks that sources name: data folders and published files alike."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vlm.data.config import SourceFields
from vlm.data.layout import default_split, has_manifest
from vlm.errors import ConfigError, DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.opening import open_benchmark
from vlm.evaluation.retrieval.pairs import RetrievalPairs, pairs_of_split
from vlm.storage.places import shown

_FOLDER_SPLIT = "test_style"
_FOR_FOLDERS = ("pixels", "questions", "part")
_FOR_SOURCES = ("where", *(each.name for each in fields(SourceFields)))
_FOR_BENCHMARKS = ("kind", "images", "language", "duplicates", "lower_case", "allowed_share")
_SOURCES = "data folders and other sources (`kind: source` in a file of --config)"
_PLAIN = RetrievalSource(path="")
_PACKED = ("chinese-clip", "webdataset")


def sources_of(
    entries: Sequence[str | Path | RetrievalSource],
    *,
    common: Mapping[str, Any] | None = None,
    folder_split: str | None = None,
) -> list[RetrievalSource]:
    """Return the sources, each with a name of its own.

    Args:
        entries: `NAME=PATH`, paths, or sources.
        common: Settings for sources that do not give them, by `RetrievalSource`'s field names.
        folder_split: The split of data folders for which none is given; None is the only one or
            test_style.

    Raises:
        ConfigError: there is no entry, one names no path, or two sources have one name.
    """
    if not entries:
        raise ConfigError("no benchmark is given; expected at least one NAME=PATH or PATH")
    found: dict[str, RetrievalSource] = {}
    for entry in entries:
        if isinstance(entry, Path):
            source = RetrievalSource(path=str(entry))
        else:
            source = parse_source(entry) if isinstance(entry, str) else entry
        missing = {
            name: value
            for name, value in (common or {}).items()
            if getattr(source, name) == getattr(_PLAIN, name)
        }
        source = replace(source, **missing)
        if has_manifest(source.path):
            split = source.split or folder_split or default_split(source.path, _FOLDER_SPLIT)
            source = replace(source, split=split, name=source.name or split)
        else:
            source = replace(source, name=source.name or _name_of(source.path))
        if source.name in found:
            raise ConfigError(
                f"two benchmarks are called {source.name}: {shown(found[source.name].path)} and "
                f"{shown(source.path)}; name them by NAME=PATH"
            )
        found[source.name] = source
    return list(found.values())


def _name_of(path: str) -> str:
    """Return the last part of a path that is no pattern, without its suffix."""
    parts = Path(shown(path)).absolute().parts
    return Path([part for part in parts if not set(part) & set("{*?[")][-1]).stem


def parse_source(text: str) -> RetrievalSource:
    """Read `NAME=PATH` or `PATH`; what has a slash before the first `=` is a path.

    Raises:
        ConfigError: there is no name or no path.
    """
    name, sign, path = text.partition("=")
    if not sign or "/" in name:
        name, path = "", text
    if not path or (sign and not name and path != text):
        raise ConfigError(f"{text!r} names no benchmark; expected NAME=PATH or PATH")
    return RetrievalSource(path=path, name=name)


def open_source(source: RetrievalSource, *, languages: Sequence[str]) -> RetrievalPairs:
    """Open what is to be asked, and make its questions.

    A data folder, which has a manifest, is asked by concept, by default in `languages`, those of
    the model; all else, the files of a benchmark or any other source, caption by caption.

    Raises:
        ConfigError: a setting does not fit the files.
        DataError: the files are missing, damaged or of no known kind, more is missing than
            allowed, or nothing is left to ask.
    """
    if not has_manifest(source.path):
        _refuse(source, _FOR_FOLDERS, what="no data folder", owner="data folders, with concepts")
        pairs = open_benchmark(source)
        if pairs.kind == "source":
            return pairs
        what = f"a benchmark ({pairs.kind})"
        _refuse(source, _FOR_SOURCES, what=what, owner=_SOURCES)
        if pairs.kind in _PACKED:
            owner = "benchmarks whose images are files of their own"
            _refuse(source, ("images",), what=f"{what} that holds its images", owner=owner)
        return pairs
    _refuse(source, _FOR_BENCHMARKS, what="a data folder", owner="the files of a benchmark")
    split = source.split or default_split(source.path, _FOLDER_SPLIT)
    config = replace(source, split=split).config()
    pairs = pairs_of_split(config, languages=source.languages or languages)
    missing = [language for language in source.languages or () if language not in pairs.texts]
    if missing:
        raise DataError(
            f"the split {config.split!r} of {shown(source.path)} has no captions in "
            f"{' or '.join(missing)} among the samples asked for; found {', '.join(pairs.texts)}"
        )
    return pairs


def _refuse(source: RetrievalSource, settings: Sequence[str], *, what: str, owner: str) -> None:
    """Refuse settings that would be ignored; empty ones are allowed."""
    given = [name for name in settings if getattr(source, name)]
    if given:
        raise ConfigError(
            f"{shown(source.path)} is {what}; found {' and '.join(given)}, which "
            f"{'is' if len(given) == 1 else 'are'} for {owner}; expected none, or each benchmark "
            "with settings of its own, as in configs/evaluate"
        )
