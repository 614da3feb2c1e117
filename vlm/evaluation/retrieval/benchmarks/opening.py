"""Open a benchmark of any known kind, which is recognised from what its files hold."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

from vlm.data.tables import columns_of
from vlm.errors import DataError
from vlm.evaluation.config import Kind, RetrievalSource
from vlm.evaluation.retrieval.benchmarks import annotations, tables
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, assemble
from vlm.evaluation.retrieval.benchmarks.chinese_clip import is_chinese_clip, list_chinese_clip
from vlm.evaluation.retrieval.benchmarks.numbered_captions import (
    is_numbered_captions,
    list_numbered_captions,
)
from vlm.evaluation.retrieval.benchmarks.tar_shards import is_tar_shards, list_tar_shards
from vlm.evaluation.retrieval.pairs import RetrievalPairs


class _Reader(NamedTuple):
    recognises: Callable[[Path], bool]
    list_files: Callable[[RetrievalSource], Listing]
    what: str


_READERS: Mapping[Kind, _Reader] = {
    "chinese-clip": _Reader(
        is_chinese_clip, list_chinese_clip, "a folder with SPLIT_texts.jsonl and SPLIT_imgs.tsv"
    ),
    "m2-encoder": _Reader(
        annotations.is_m2_encoder,
        annotations.list_m2_encoder,
        "lines of JSON with image and caption",
    ),
    "karpathy": _Reader(
        annotations.is_karpathy,
        annotations.list_karpathy,
        "JSON with images that have sentences",
    ),
    "numbered-captions": _Reader(
        is_numbered_captions, list_numbered_captions, "lines such as IMAGE#0 and a caption"
    ),
    "xm3600": _Reader(
        annotations.is_xm3600, annotations.list_xm3600, "captions.jsonl with image/key"
    ),
    "xtd10": _Reader(
        annotations.is_xtd10,
        annotations.list_xtd10,
        "a folder with test_image_names.txt and test_1kcaptions_*.txt",
    ),
    "webdataset": _Reader(is_tar_shards, list_tar_shards, "tar files with images and texts"),
    "table": _Reader(
        tables.is_table,
        tables.list_table,
        "a csv, tsv or parquet file with columns such as image and caption",
    ),
}


def open_benchmark(source: RetrievalSource) -> RetrievalPairs:
    """Read a benchmark's lists and captions; its images are read when they are asked for.

    Args:
        source: A file or folder of one of the kinds, and how to read it. Images that are files of
            their own lie in the folder of the file; in a folder that is given, also below it.

    Raises:
        DataError: the path is of no known kind, its files are damaged, more is missing than
            allowed, or a language that is asked for has no captions.
    """
    path, kind = source.path, source.kind
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a benchmark's file or folder")
    if kind is None:
        kind = kind_of(path)
    elif kind not in get_args(Kind):
        raise DataError(f"{kind!r} is no kind of benchmark; expected {' or '.join(get_args(Kind))}")
    try:
        return assemble(_READERS[kind].list_files(source), source, kind=kind)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def kind_of(path: Path) -> Kind:
    """Return the kind of benchmark that a path holds.

    Raises:
        DataError: it is of no known kind, or of several.
    """
    found = [kind for kind, reader in _READERS.items() if reader.recognises(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path} may be {' or '.join(found)}; set kind to one of them")
    if path.suffix.lower() in (".csv", ".tsv", ".parquet") and columns_of(path):
        raise tables.not_understood(path)
    known = "; ".join(f"{kind} ({reader.what})" for kind, reader in _READERS.items())
    raise DataError(f"{path} is no benchmark of a known kind; known are {known}")
