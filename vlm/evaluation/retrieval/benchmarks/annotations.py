"""JSON files that name image files: M2-Encoder's lines, Karpathy's splits of COCO and Flickr30k.

M2-Encoder's files have an object a line, `{"image": path, "caption": [text, ...]}`; Karpathy's
are one object whose `images` have `filename`, `split` and `sentences`.
"""

from collections.abc import Iterator
from pathlib import Path

from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Request, Row, listing_of_files
from vlm.evaluation.retrieval.benchmarks.images import ImageFolder
from vlm.evaluation.retrieval.benchmarks.lines import (
    choose_split,
    first_record,
    parse_object,
    records_of,
    texts_in,
)  # fmt: skip

_HEAD = 1 << 14


def is_m2_encoder(path: Path) -> bool:
    """Say whether a path is a file of lines with an image and its captions."""
    return path.is_file() and {"image", "caption"} <= first_record(path).keys()


def list_m2_encoder(request: Request) -> Listing:
    """List the images and captions; an image on two lines has the captions of both."""
    choose_split((), request.split, request.path)
    names, rows = [], []
    for number, record in records_of(request.path):
        place = f"{request.path}, line {number}"
        name = record.get("image")
        if not isinstance(name, str) or "caption" not in record:
            raise DataError(f'{place} has no "image" with a "caption"; found {", ".join(record)}')
        names.append(name)
        rows += [Row(text, (name,), number) for text in texts_in(record["caption"], place)]
    folder = ImageFolder(request.images, request.path.parent)
    return listing_of_files(names, folder, rows=rows, files=(request.path,))


def is_karpathy(path: Path) -> bool:
    """Say whether a path is one JSON object with `images` that have `sentences`."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return head.lstrip()[:1] == b"{" and b'"images"' in head and b'"sentences"' in head


def list_karpathy(request: Request) -> Listing:
    """List the images of a split; what Karpathy calls `restval` is part of `train`."""
    path = request.path
    record = parse_object(path.read_text(encoding="utf-8"), str(path))
    images = list(_karpathy_images(record, path))
    split = choose_split((of for _, of, _ in images), request.split, path)
    names, rows = [], []
    for number, (name, of, texts) in enumerate(images, start=1):
        if of == split:
            names.append(name)
            rows += [Row(text, (name,), number) for text in texts]
    folder = ImageFolder(request.images, path.parent)
    return listing_of_files(names, folder, rows=rows, files=(path,), split=split, unit="image")


def _karpathy_images(record: dict[str, object], path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Give the file, the split and the captions of each image."""
    images = record.get("images")
    if not isinstance(images, list):
        raise DataError(f'{path} has no list of "images"; found {", ".join(record)}')
    try:
        for image in images:
            name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            texts = texts_in([s["raw"] for s in image["sentences"]], f"{path}, {name!r}")
            split = str(image["split"])
            yield name, "train" if split == "restval" else split, texts
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path} has an image without "filename", "split" or "sentences" with "raw": {error}'
        ) from error
