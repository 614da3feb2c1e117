"""Open a benchmark of any known kind, which is recognised from what its files hold."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from vlm.errors import ConfigError, DataError
from vlm.evaluation.config import Kind, RetrievalSource
from vlm.evaluation.retrieval.benchmarks import annotations, chinese_clip, tables, tar_shards
from vlm.evaluation.retrieval.benchmarks.any_source import list_source
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, assemble
from vlm.evaluation.retrieval.pairs import RetrievalPairs
from vlm.storage.places import is_remote, shown

_Format = tuple[Callable[[Path], bool], Callable[[RetrievalSource], Listing]]
"""What recognises a kind, and what lists its images and captions."""
_FORMATS: Mapping[Kind, _Format] = {
    "chinese-clip": (chinese_clip.is_chinese_clip, chinese_clip.list_chinese_clip),
    "m2-encoder": (annotations.is_m2_encoder, annotations.list_m2_encoder),
    "karpathy": (annotations.is_karpathy, annotations.list_karpathy),
    "numbered-captions": (annotations.is_numbered_captions, annotations.list_numbered_captions),
    "xm3600": (annotations.is_xm3600, annotations.list_xm3600),
    "xtd10": (annotations.is_xtd10, annotations.list_xtd10),
    "webdataset": (tar_shards.is_tar_shards, tar_shards.list_tar_shards),
    "table": (tables.is_table, tables.list_table),
}


def open_benchmark(source: RetrievalSource) -> RetrievalPairs:
    """Read a benchmark's lists and captions; its images are read when they are asked for.

    Args:
        source: A file or folder of one of the kinds, or any source that is no data folder, and how
            to read it. Images that are files of their own lie in the folder of the file; in a
            folder that is given, also below it.

    Raises:
        ConfigError: the files of a benchmark are at a URL.
        DataError: the path is of no known kind, its files are damaged, more is missing than
            allowed, or a language that is asked for has no captions.
        PlaceError: the place of a URL cannot be reached.
    """
    kind = source.kind or kind_of(source)
    if kind not in get_args(Kind):
        raise DataError(f"{kind!r} is no kind of benchmark; expected {' or '.join(get_args(Kind))}")
    try:
        if kind == "source":
            listing = _list_source(source)
        elif is_remote(source.path):
            raise ConfigError(
                f"{shown(source.path)} is at a URL; found the kind {kind}, which is read from "
                "files of this machine only"
            )
        else:
            listing = _FORMATS[kind][1](source)
        return assemble(listing, source, kind=kind)
    except OSError as error:
        name = error.filename or source.path
        raise DataError(f"{name} cannot be read: {error.strerror}") from error


def kind_of(source: RetrievalSource) -> Kind:
    """Return the kind of benchmark that a path holds; `source` if it is none.

    A URL or a pattern is always a source.
    """
    path = source.file
    if is_remote(source.path) or (not path.exists() and set(source.path) & set("{*?[")):
        return "source"
    if not path.exists():
        raise DataError(
            f"{path} does not exist; expected a data folder, the files of a benchmark, or another "
            "source"
        )
    found = [kind for kind, (recognises, _) in _FORMATS.items() if recognises(path)]
    if len(found) > 1:
        raise DataError(f"{path} may be {' or '.join(found)}; set kind to one of them")
    return found[0] if found else "source"


def _list_source(source: RetrievalSource) -> Listing:
    try:
        return list_source(source)
    except DataError as error:
        if source.kind or is_remote(source.path) or not source.file.exists():
            raise
        raise DataError(
            f"{source.path} is no benchmark of a known kind ({', '.join(_FORMATS)}), and as a "
            f"source: {error}"
        ) from error
