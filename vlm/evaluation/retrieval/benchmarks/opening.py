"""Open a benchmark of any known kind: what a path is, is told by what it holds."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, get_args

from vlm.errors import DataError
from vlm.evaluation.config import Kind
from vlm.evaluation.retrieval.benchmarks.annotations import (
    is_karpathy,
    is_m2_encoder,
    list_karpathy,
    list_m2_encoder,
)  # fmt: skip
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Request, assemble
from vlm.evaluation.retrieval.benchmarks.benchmark import Benchmark
from vlm.evaluation.retrieval.benchmarks.chinese_clip import is_chinese_clip, list_chinese_clip
from vlm.evaluation.retrieval.benchmarks.multilingual import (
    is_xm3600,
    is_xtd10,
    list_xm3600,
    list_xtd10,
)
from vlm.evaluation.retrieval.benchmarks.numbered_captions import (
    is_numbered_captions,
    list_numbered_captions,
)
from vlm.evaluation.retrieval.benchmarks.tables import is_table, list_table
from vlm.evaluation.retrieval.benchmarks.tar_shards import is_tar_shards, list_tar_shards


class _Reader(NamedTuple):
    recognises: Callable[[Path], bool]
    list_files: Callable[[Request], Listing]
    what: str


_READERS: Mapping[Kind, _Reader] = {
    "chinese-clip": _Reader(
        is_chinese_clip, list_chinese_clip, "a folder with SPLIT_texts.jsonl and SPLIT_imgs.tsv"
    ),
    "m2-encoder": _Reader(is_m2_encoder, list_m2_encoder, "lines of JSON with image and caption"),
    "karpathy": _Reader(is_karpathy, list_karpathy, "JSON with images that have sentences"),
    "numbered-captions": _Reader(
        is_numbered_captions, list_numbered_captions, "lines such as IMAGE#0 and a caption"
    ),
    "xm3600": _Reader(is_xm3600, list_xm3600, "captions.jsonl with image/key"),
    "xtd10": _Reader(
        is_xtd10, list_xtd10, "a folder with test_image_names.txt and test_1kcaptions_*.txt"
    ),
    "webdataset": _Reader(is_tar_shards, list_tar_shards, "tar files with images and texts"),
    "table": _Reader(
        is_table, list_table, "a csv, tsv or parquet file with columns such as image and caption"
    ),
}  # fmt: skip


def open_benchmark(
    path: Path,
    *,
    kind: Kind | None = None,
    split: str | None = None,
    images: Path | None = None,
    language: str | None = None,
    allowed_share: float = 0.01,
) -> Benchmark:
    """Read a benchmark's lists and captions; its images are read when they are asked for.

    Args:
        path: A file or folder of one of the kinds.
        kind: What it is; None to tell from what it holds.
        split: The split to read; None for the only one, or `test` if there are several.
        images: The folder with the images, where they are files of their own; None for the
            folder of the file. In a folder that is given, images may lie in folders below.
        language: The language of captions that do not say it; None to tell from their letters.
            Where the files say it, only captions in this language are read.
        allowed_share: The share in [0, 1] of images that may be missing, and of captions that
            may be empty or name unknown images; they are left out, and counted in `findings`.

    Raises:
        DataError: the path is of no known kind, its files are damaged, or more than the allowed
            share is missing.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; expected a benchmark's file or folder")
    if kind is None:
        kind = kind_of(path)
    elif kind not in get_args(Kind):
        raise DataError(f"{kind!r} is no kind of benchmark; expected {' or '.join(get_args(Kind))}")
    request = Request(
        path=path, split=split, images=images, language=language, allowed_share=allowed_share
    )
    try:
        return assemble(_READERS[kind].list_files(request), request, kind=kind)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error.reason}") from error


def kind_of(path: Path) -> Kind:
    """Return the kind of benchmark that a path holds.

    Raises:
        DataError: it is of no known kind, or of several.
    """
    found = [kind for kind, reader in _READERS.items() if reader.recognises(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path} may be {' or '.join(found)}; say which kind it is")
    known = "; ".join(f"{kind} ({reader.what})" for kind, reader in _READERS.items())
    raise DataError(f"{path} is no benchmark of a known kind; known are {known}")
