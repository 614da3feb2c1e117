"""CLIP_benchmark's WebDatasets for retrieval: tar files of images with `.txt` or `.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlm.data.records import Member, decoded, object_in, samples_of, texts_in
from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Row, choose_split
from vlm.evaluation.retrieval.benchmarks.images import SUFFIXES, TarMembers
from vlm.files import lines_in

_IMAGES = frozenset(suffix.removeprefix(".") for suffix in SUFFIXES)
_MAGIC = slice(257, 262)


def is_tar_shards(path: Path) -> bool:
    """Say whether a path is a tar file, or a folder with some, in it or in a folder a split."""
    if path.is_file():
        with path.open("rb") as file:
            return file.read(_MAGIC.stop)[_MAGIC] == b"ustar"
    return bool(_tars_by_split(path))


def list_tar_shards(source: RetrievalSource) -> Listing:
    """List the samples of a split, in the order of the files' numbers."""
    if source.path.is_file():
        choose_split((), source.split, source.path)
        split, paths = "", [source.path]
    else:
        by_split = _tars_by_split(source.path)
        split = choose_split((of for of in by_split if of), source.split, source.path)
        paths = by_split[split]
    names: list[str] = []
    spans: list[tuple[int, int, int]] = []
    rows: list[Row] = []
    for number, path in enumerate(paths):
        for key, members in _samples_in(path).items():
            name, where = f"{path.stem}/{key}", f"{path}, {key!r}"
            images = [member for kind, member in members.items() if kind in _IMAGES]
            if len(images) != 1:
                raise DataError(f"{where} needs one image, has {', '.join(sorted(members))}")
            spans.append((number, images[0].start, images[0].size))
            names.append(name)
            rows += [
                Row(text, (name,), f"sample {len(names)}", language)
                for text, language in _captions_in(members, where)
            ]
    read = TarMembers(tuple(paths), np.array(spans, dtype=np.int64).reshape(-1, 3))
    return Listing(split=split, image_ids=names, read=read, rows=rows)


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


def _samples_in(path: Path) -> dict[str, dict[str, Member]]:
    """Return members by key and extension; those of one key need not be neighbours."""
    samples: dict[str, dict[str, Member]] = {}
    for place, (key, members) in samples_of(path):
        known = samples.setdefault(key, {})
        if twice := sorted(known.keys() & members.keys()):
            raise DataError(f"{path}, {place} has two members .{twice[0]}; expected one")
        known.update(members)
    return samples


def _captions_in(members: Mapping[str, Member], where: str) -> Sequence[tuple[str, str]]:
    """Return texts with their languages; a `.txt` has one a line, without a language."""
    if "json" in members:
        record = object_in(decoded(members["json"].content, where), f"{where}, its .json")
        captions = record.get("captions", record.get("caption"))
        if isinstance(captions, dict):
            return [(t, code) for code, of in captions.items() for t in texts_in(of, where)]
        if captions is not None:
            return [(t, "") for t in texts_in(captions, where)]
    if "txt" in members:
        text = decoded(members["txt"].content, f"{where}, its .txt")
        return [(line, "") for line in lines_in(text)]
    what = "class labels, so it is no retrieval benchmark" if "cls" in members else "no captions"
    raise DataError(f"{where} has {what}; expected a .txt or a .json with captions")
