"""Open a benchmark of any known kind, which is recognised from what its files hold."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from vlm.data.scanning import not_understood
from vlm.data.tables import columns_of
from vlm.errors import DataError
from vlm.evaluation.config import Kind, RetrievalSource
from vlm.evaluation.retrieval.benchmarks import annotations, chinese_clip, tables, tar_shards
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, assemble
from vlm.evaluation.retrieval.pairs import RetrievalPairs

_Format = tuple[Callable[[Path], bool], Callable[[RetrievalSource], Listing], str]
"""What recognises a kind, what lists its images and captions, and how it looks."""
_FORMATS: Mapping[Kind, _Format] = {
    "chinese-clip": (chinese_clip.is_chinese_clip, chinese_clip.list_chinese_clip,
                     "a folder with SPLIT_texts.jsonl and SPLIT_imgs.tsv"),
    "m2-encoder": (annotations.is_m2_encoder, annotations.list_m2_encoder,
                   "lines of JSON with image and caption"),
    "karpathy": (annotations.is_karpathy, annotations.list_karpathy,
                 "JSON with images that have sentences"),
    "numbered-captions": (annotations.is_numbered_captions, annotations.list_numbered_captions,
                          "lines such as IMAGE#0 and a caption"),
    "xm3600": (annotations.is_xm3600, annotations.list_xm3600, "captions.jsonl with image/key"),
    "xtd10": (annotations.is_xtd10, annotations.list_xtd10,
              "a folder with test_image_names.txt and test_1kcaptions_*.txt"),
    "webdataset": (tar_shards.is_tar_shards, tar_shards.list_tar_shards,
                   "tar files with images and texts"),
    "table": (tables.is_table, tables.list_table,
              "a csv, tsv or parquet file with columns such as image and caption"),
}  # fmt: skip


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
        _, list_benchmark, _ = _FORMATS[kind]
        return assemble(list_benchmark(source), source, kind=kind)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def kind_of(path: Path) -> Kind:
    """Return the kind of benchmark that a path holds."""
    found = [kind for kind, (recognises, *_) in _FORMATS.items() if recognises(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path} may be {' or '.join(found)}; set kind to one of them")
    if path.suffix.lower() in (".csv", ".tsv", ".parquet") and columns_of(path):
        raise not_understood(path)
    known = "; ".join(f"{kind} ({look})" for kind, (_, _, look) in _FORMATS.items())
    raise DataError(f"{path} is no benchmark of a known kind; known are {known}")
