"""Lines of numbered captions, `IMAGE#0 caption`, with lists of ids: COCO-CN and Flickr30k-CN.

COCO-CN keeps `coco-cn_SPLIT.txt` and `imageid.KIND-caption.txt` in one folder, Flickr30k-CN a list
in `ImageSets` and `IMAGE#zhm#0 caption` in `TextData`. A tab or a space goes before the caption.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.data.records import first_line, lines_of
from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.assembling import (
    Listing,
    Row,
    choose_split,
    listing_of_files,
)
from vlm.evaluation.retrieval.benchmarks.images import ImageFolder

_LINE = re.compile(r"([^\s#]+)#(?:[^\s#]+#)?\d+(?:[\t ](.*))?", re.DOTALL)
_ID = re.compile(r"[^\s#]+")
_MAIN = "imageid.human-written-caption.txt"
_CAPTION_FOLDERS, _LIST_FOLDERS = (".", "TextData"), (".", "ImageSets")


def is_numbered_captions(path: Path) -> bool:
    """Say whether a path is such a file of captions, or a folder with one."""
    return bool(_caption_files(path))


def list_numbered_captions(source: RetrievalSource) -> Listing:
    """List the images of a split, or all that the captions name where there is no list of ids.

    Raises:
        DataError: the folder has several files of captions, or a line does not fit.
    """
    path = _choose(_caption_files(source.path), source.path)
    rows = list(_rows_of(path))
    folder = ImageFolder(source.images, path.parent)
    named = dict.fromkeys(name for row in rows for name in row.image_ids)
    found = _lists_near(path)
    lists = {of: names for of, names in found.items() if not named.keys().isdisjoint(names[1])}
    split = choose_split(lists, source.split, source.path)
    if not lists:
        strange = ", ".join(file.name for file, _ in found.values())
        notes = (f"all images of {path.name}; {strange} name none of them",) if strange else ()
        return listing_of_files(named, folder, rows=rows, notes=notes)
    of_split = lists[split][1]
    others = {name for _, names in lists.values() for name in names}.difference(of_split)
    return listing_of_files(
        of_split,
        folder,
        rows=[row for row in rows if row.image_ids[0] not in others],
        split=split,
        notes=(f"captions of {path.name}",),
    )


def _caption_files(path: Path) -> Sequence[Path]:
    if path.is_dir():
        files = [file for part in _CAPTION_FOLDERS for file in sorted((path / part).glob("*.txt"))]
    else:
        files = [path]
    return [file for file in files if _LINE.fullmatch(first_line(file))]


def _choose(files: Sequence[Path], path: Path) -> Path:
    """Return the only file, or COCO-CN's captions that were written for the images."""
    main = [file for file in files if file.name == _MAIN]
    if len(files) != 1 and not main:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path} has several files of captions: {names}; give one of them")
    return main[0] if main else files[0]


def _rows_of(path: Path) -> Iterator[Row]:
    for place, line in lines_of(path):
        if not line.strip():
            continue
        parts = _LINE.fullmatch(line)
        if parts is None:
            raise DataError(
                f"{path}, {place} is {line[:40]!r}; expected IMAGE#NUMBER, a tab or a "
                "space, and a caption"
            )
        yield Row(parts[2] or "", (parts[1],), place)


def _lists_near(captions: Path) -> dict[str, tuple[Path, list[str]]]:
    """Return file and ids of the lists, files with one id a line, next to a file of captions.

    They are by split, which is the last part of the file's name: `coco-cn_test.txt`.
    """
    folder = captions.parent if captions.parent.name != "TextData" else captions.parent.parent
    lists = {}
    for part in _LIST_FOLDERS:
        for file in sorted((folder / part).glob("*.txt")):
            if file != captions and _ID.fullmatch(first_line(file).strip()):
                names = [line.strip() for _, line in lines_of(file) if line.strip()]
                if all(map(_ID.fullmatch, names)):
                    lists[re.split("[-_]", file.stem)[-1]] = (file, names)
    return lists
