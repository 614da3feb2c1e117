"""Open a benchmark of any known kind, which is recognised from what its files hold."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from vlm.data.layout import layout_of
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
    path = source.file
    is_elsewhere = is_remote(source.path)
    is_pattern = not is_elsewhere and not path.exists() and set(source.path) & set("{*?[")
    if not (is_elsewhere or is_pattern or path.exists()):
        raise DataError(
            f"{path} does not exist; expected a data folder, the files of a benchmark, or another "
            "source"
        )
    kind = source.kind or ("source" if is_elsewhere or is_pattern else kind_of(source))
    if kind not in get_args(Kind):
        raise DataError(f"{kind!r} is no kind of benchmark; expected {' or '.join(get_args(Kind))}")
    try:
        if kind == "source":
            listing = list_source(source)
        elif is_elsewhere:
            raise ConfigError(
                f"{shown(source.path)} is at a URL; found the kind {kind}, which is read from "
                "files of this machine only"
            )
        else:
            listing = _FORMATS[kind][1](source)
        return assemble(listing, source, kind=kind)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def kind_of(source: RetrievalSource) -> Kind:
    """Return the kind of benchmark that files here are, or `source`.

    Raises:
        DataError: they are of no known kind, or may be of several.
    """
    path = source.file
    found = [kind for kind, (recognises, _) in _FORMATS.items() if recognises(path)]
    if len(found) > 1:
        raise DataError(f"{path} may be {' or '.join(found)}; set kind to one of them")
    if found:
        return found[0]
    try:
        layout_of(source.config())
    except DataError as error:
        raise DataError(
            f"{path} is no benchmark of a known kind ({', '.join(_FORMATS)}), and as a source: "
            f"{error}"
        ) from error
    return "source"
