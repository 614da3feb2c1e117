"""Benchmarks with captions in many languages: XM3600 and XTD10."""

from pathlib import Path

from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Request, Row, listing_of_files
from vlm.evaluation.retrieval.benchmarks.images import ImageFolder
from vlm.evaluation.retrieval.benchmarks.lines import (
    choose_split,
    first_record,
    lines_of,
    records_of,
    texts_in,
)

_XM3600, _KEY = "captions.jsonl", "image/key"
_XTD_NAMES, _XTD_CAPTIONS = "test_image_names.txt", "test_1kcaptions_"
_XTD_CODES = {"jp": "ja"}


def is_xm3600(path: Path) -> bool:
    """Say whether a path is XM3600's file of captions, or a folder with it."""
    return _KEY in first_record(path / _XM3600 if path.is_dir() else path)


def list_xm3600(request: Request) -> Listing:
    """List the images `KEY.jpg` of a folder, or of `images` in it, and captions by language.

    The captions of each language were written in view of the image alone: they are no
    translations.
    """
    choose_split((), request.split, request.path)
    path = request.path / _XM3600 if request.path.is_dir() else request.path
    names, rows = [], []
    for number, record in records_of(path):
        name = record.get(_KEY)
        if not isinstance(name, str):
            raise DataError(f'{path}, line {number} has no "{_KEY}"; found {", ".join(record)}')
        names.append(name)
        for language, value in record.items():
            if isinstance(value, dict) and "caption" in value:
                texts = texts_in(value["caption"], f"{path}, line {number}, {language!r}")
                rows += [Row(text, (name,), number, language) for text in texts]
    return listing_of_files(
        names, _images(request, path.parent), rows=rows, files=(path,), translated=False
    )


def is_xtd10(path: Path) -> bool:
    """Say whether a path is a folder with XTD10's list of images and its captions."""
    return (path / _XTD_NAMES).is_file() and any(path.glob(f"{_XTD_CAPTIONS}*.txt"))


def list_xtd10(request: Request) -> Listing:
    """List the images, which are COCO's, and the caption of each in every language there is.

    Raises:
        DataError: a language has more or fewer captions than there are images.
    """
    folder = request.path
    choose_split((), request.split, folder)
    names = [line.strip() for _, line in lines_of(folder / _XTD_NAMES)]
    files = sorted(folder.glob(f"{_XTD_CAPTIONS}*.txt"))
    rows = []
    for file in files:
        code = file.stem.removeprefix(_XTD_CAPTIONS)
        texts = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
        if len(texts) != len(names):
            raise DataError(
                f"{file} has {len(texts)} captions; expected {len(names)}, one for each image of "
                f"{_XTD_NAMES}"
            )
        rows += [
            Row(text.strip("\r\n"), (name,), number, _XTD_CODES.get(code, code))
            for number, (text, name) in enumerate(zip(texts, names, strict=True), start=1)
        ]
    return listing_of_files(
        names, _images(request, folder), rows=rows, files=(folder / _XTD_NAMES, *files)
    )


def _images(request: Request, folder: Path) -> ImageFolder:
    inside = folder / "images"
    return ImageFolder(request.images, inside if inside.is_dir() else folder)
