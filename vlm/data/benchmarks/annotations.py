"""JSON files that name picture files: M2-Encoder's lines, Karpathy's splits of COCO and Flickr30k.

M2-Encoder's files have an object a line, `{"image": path, "caption": [text, ...]}`; Karpathy's
are one object whose `images` have `filename`, `split` and `sentences`.
"""

from collections.abc import Iterator
from pathlib import Path

from vlm.data.benchmarks.assembling import Listing, Request, Row, listing_of_files
from vlm.data.benchmarks.lines import (
    choose_split,
    first_record,
    parse_object,
    records_of,
    texts_in,
)  # fmt: skip
from vlm.data.benchmarks.pictures import PictureFolder
from vlm.errors import DataError

_HEAD = 1 << 14


def is_m2_encoder(path: Path) -> bool:
    """Say whether a path is a file of lines with a picture and its captions."""
    return path.is_file() and {"image", "caption"} <= first_record(path).keys()


def list_m2_encoder(request: Request) -> Listing:
    """List the pictures and captions; a picture on two lines has the captions of both."""
    choose_split((), request.split, request.path)
    names, rows = [], []
    for number, record in records_of(request.path):
        place = f"{request.path}, line {number}"
        name = record.get("image")
        if not isinstance(name, str) or "caption" not in record:
            raise DataError(f'{place} has no "image" with a "caption"; found {", ".join(record)}')
        names.append(name)
        rows += [Row(text, (name,), number) for text in texts_in(record["caption"], place)]
    folder = PictureFolder(request.images, request.path.parent)
    return listing_of_files(names, folder, rows=rows, files=(request.path,))


def is_karpathy(path: Path) -> bool:
    """Say whether a path is one JSON object with `images` that have `sentences`."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return head.lstrip()[:1] == b"{" and b'"images"' in head and b'"sentences"' in head


def list_karpathy(request: Request) -> Listing:
    """List the pictures of a split; what Karpathy calls `restval` is part of `train`."""
    path = request.path
    record = parse_object(path.read_text(encoding="utf-8"), str(path))
    pictures = list(_karpathy_pictures(record, path))
    split = choose_split((of for _, of, _ in pictures), request.split, path)
    names, rows = [], []
    for number, (name, of, texts) in enumerate(pictures, start=1):
        if of == split:
            names.append(name)
            rows += [Row(text, (name,), number) for text in texts]
    folder = PictureFolder(request.images, path.parent)
    return listing_of_files(names, folder, rows=rows, files=(path,), split=split, unit="picture")


def _karpathy_pictures(
    record: dict[str, object], path: Path
) -> Iterator[tuple[str, str, list[str]]]:
    """Give the file, the split and the captions of each picture."""
    pictures = record.get("images")
    if not isinstance(pictures, list):
        raise DataError(f'{path} has no list of "images"; found {", ".join(record)}')
    try:
        for picture in pictures:
            name = "/".join(filter(None, (picture.get("filepath"), picture["filename"])))
            texts = texts_in([s["raw"] for s in picture["sentences"]], f"{path}, {name!r}")
            split = str(picture["split"])
            yield name, "train" if split == "restval" else split, texts
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path} has a picture without "filename", "split" or "sentences" with "raw": {error}'
        ) from error
