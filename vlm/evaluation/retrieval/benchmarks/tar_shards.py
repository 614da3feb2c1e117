"""CLIP_benchmark's WebDatasets for retrieval: tar files of images with `.txt` or `.json`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlm.data.fields import texts_by_tag
from vlm.data.layout import tars_in
from vlm.data.records import Member
from vlm.data.scanning import IMAGE_EXTENSIONS, members_by_key, record_of
from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Row, choose_split
from vlm.evaluation.retrieval.benchmarks.images import TarMembers

_MAGIC = slice(257, 262)


def is_tar_shards(path: Path) -> bool:
    """Say whether a path is a tar file, or a folder with some, in it or in a folder a split."""
    if path.is_file():
        with path.open("rb") as file:
            return file.read(_MAGIC.stop)[_MAGIC] == b"ustar"
    return bool(tars_in(path))


def list_tar_shards(source: RetrievalSource) -> Listing:
    """List the samples of a split, in the order of the files' numbers."""
    if source.file.is_file():
        choose_split((), source.split, source.file)
        split, paths = "", [source.file]
    else:
        by_split = tars_in(source.file)
        split = choose_split((of for of in by_split if of), source.split, source.file)
        paths = by_split[split]
    names: list[str] = []
    spans: list[tuple[int, int, int]] = []
    rows: list[Row] = []
    for number, path in enumerate(paths):
        for key, members in members_by_key(path)[1].items():
            name, where = f"{path.stem}/{key}", f"{path}, {key!r}"
            images = [member for kind, member in members.items() if kind in IMAGE_EXTENSIONS]
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


def _captions_in(members: Mapping[str, Member], where: str) -> Sequence[tuple[str, str]]:
    """Return texts with their languages; a `.txt` has one a line, without a language."""
    record = record_of({name: member.content for name, member in members.items()}, where)
    captions = texts_by_tag(record["json"], where) if "json" in record else None
    if captions is None and "txt" in record:
        captions = {"": record["txt"]}
    if captions is None:
        what = (
            "class labels, so it is no retrieval benchmark" if "cls" in members else "no captions"
        )
        raise DataError(f"{where} has {what}; expected a .txt or a .json with captions")
    return [(text, tag) for tag, texts in captions.items() for text in texts]
