"""CLIP_benchmark's WebDatasets for retrieval: images with `.txt` or `.json` members in tar files.

They are read through an index of ours, which runs no decoder and refuses a damaged tar; webdataset
itself passes over damage in silence.
"""

import mmap
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlm.data.shards import map_file, spans_by_key
from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Request, Row
from vlm.evaluation.retrieval.benchmarks.images import SUFFIXES, TarMembers
from vlm.evaluation.retrieval.benchmarks.lines import choose_split, parse_object, texts_in

_IMAGES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
_MAGIC = slice(257, 262)
Span = tuple[int, int]


def is_tar_shards(path: Path) -> bool:
    """Say whether a path is a tar file, or a folder with some, in it or in a folder a split."""
    if path.is_file():
        with path.open("rb") as file:
            return file.read(_MAGIC.stop)[_MAGIC] == b"ustar"
    return bool(_tars_by_split(path))


def list_tar_shards(request: Request) -> Listing:
    """List the samples of a split, in the order of the files' numbers.

    Raises:
        DataError: a tar is damaged, or a sample has no image or no captions.
    """
    if request.path.is_file():
        choose_split((), request.split, request.path)
        split, paths = "", [request.path]
    else:
        by_split = _tars_by_split(request.path)
        split = choose_split((of for of in by_split if of), request.split, request.path)
        paths = by_split[split]
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    rows: list[Row] = []
    for number, path in enumerate(paths):
        content = map_file(path)
        try:
            samples = spans_by_key(content)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        for key, members in samples.items():
            name, where = f"{path.stem}/{key}", f"{path}, {key!r}"
            places.append((number, *_image_in(members, where)))
            names.append(name)
            rows += [
                Row(text, (name,), len(names), language)
                for text, language in _captions_in(members, content, where)
            ]
    spans = np.array(places, dtype=np.int64).reshape(-1, 3)
    return Listing(
        split=split, image_ids=names, read=TarMembers(tuple(paths), spans), rows=rows,
        unit="sample", files=tuple(paths),
    )  # fmt: skip


def _tars_by_split(folder: Path) -> dict[str, list[Path]]:
    """Return the tar files by their folder, '' for this one, in the order of their numbers."""
    own = sorted(folder.glob("*.tar"), key=_by_number)
    if own:
        return {"": own}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/*.tar"), key=_by_number):
        found.setdefault(path.parent.name, []).append(path)
    return found


def _by_number(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdecimal() else -1, path.name)


def _image_in(members: dict[str, Span], where: str) -> Span:
    images = [span for suffix, span in members.items() if suffix in _IMAGES]
    if len(images) != 1:
        raise DataError(f"{where} needs one image, has {', '.join(sorted(members))}")
    return images[0]


def _captions_in(
    members: dict[str, Span], content: bytes | mmap.mmap, where: str
) -> Sequence[tuple[str, str]]:
    """Return texts with their languages; a `.txt` has one a line, without a language."""
    for suffix in ("json", "txt"):
        if suffix not in members:
            continue
        start, size = members[suffix]
        try:
            text = bytes(content[start : start + size]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: its .{suffix} is not text in UTF-8") from error
        if suffix == "txt":
            return [(line, "") for line in text.splitlines()]
        record = parse_object(text, f"{where}, its .json")
        captions = record.get("captions", record.get("caption"))
        if isinstance(captions, dict):
            return [(t, code) for code, of in captions.items() for t in texts_in(of, where)]
        if captions is not None:
            return [(t, "") for t in texts_in(captions, where)]
    what = "class labels, so it is no retrieval benchmark" if "cls" in members else "no captions"
    raise DataError(f"{where} has {what}; expected a .txt or a .json with captions")
