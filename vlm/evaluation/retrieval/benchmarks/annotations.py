"""Text files that name images: of M2-Encoder, Karpathy, XM3600, XTD10, COCO-CN and Flickr30k-CN.

M2-Encoder's have an object a line, `{"image": path, "caption": [text, ...]}`. Karpathy's splits of
COCO and Flickr30k are one object whose `images` have `filename`, `split` and `sentences`. XM3600
and XTD10 have captions in many languages.

COCO-CN and Flickr30k-CN have lines of numbered captions, `IMAGE#0 caption`, with lists of ids.
COCO-CN keeps `coco-cn_SPLIT.txt` and `imageid.KIND-caption.txt` in one folder, Flickr30k-CN a list
in `ImageSets` and `IMAGE#zhm#0 caption` in `TextData`. A tab or a space goes before the caption.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.assembling import (
    Listing,
    Row,
    choose_split,
    listing_of_files,
)
from vlm.evaluation.retrieval.benchmarks.images import ImageFolder
from vlm.files import lines_in
from vlm.records.texts import (
    decoded,
    first_line,
    first_object,
    lines_of,
    object_in,
    objects_of,
    texts_in,
)

_HEAD = 1 << 14
_XM3600, _XM3600_KEY = "captions.jsonl", "image/key"
_XTD_NAMES, _XTD_CAPTIONS = "test_image_names.txt", "test_1kcaptions_"
_XTD_CODES = {"jp": "ja"}
_LINE = re.compile(r"([^\s#]+)#(?:[^\s#]+#)?\d+(?:[\t ](.*))?", re.DOTALL)
_ID = re.compile(r"[^\s#]+")
_MAIN = "imageid.human-written-caption.txt"
_CAPTION_FOLDERS, _LIST_FOLDERS = (".", "TextData"), (".", "ImageSets")


def is_m2_encoder(path: Path) -> bool:
    """Say whether a path is a file of lines with an image and its captions."""
    return path.is_file() and {"image", "caption"} <= first_object(path).keys()


def list_m2_encoder(source: RetrievalSource) -> Listing:
    """List the images and captions; an image on two lines has the captions of both."""
    choose_split((), source.split, source.file)
    names, rows = [], []
    for place, record in objects_of(source.file):
        where = f"{source.file}, {place}"
        name = record.get("image")
        if not isinstance(name, str) or "caption" not in record:
            raise DataError(f'{where} has no "image" with a "caption"; found {", ".join(record)}')
        names.append(name)
        rows += [Row(text, (name,), place) for text in texts_in(record["caption"], where)]
    return listing_of_files(names, ImageFolder(source.images, source.file.parent), rows=rows)


def is_karpathy(path: Path) -> bool:
    """Say whether a path is one JSON object with `images` that have `sentences`."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf")
    return head.lstrip()[:1] == b"{" and b'"images"' in head and b'"sentences"' in head


def list_karpathy(source: RetrievalSource) -> Listing:
    """List the images of a split; what Karpathy calls `restval` is part of `train`."""
    path = source.file
    record = object_in(decoded(path.read_bytes(), str(path)), str(path))
    images = list(_karpathy_images(record, path))
    split = choose_split((of for _, of, _ in images), source.split, path)
    names, rows = [], []
    for number, (name, of, texts) in enumerate(images, start=1):
        if of == split:
            names.append(name)
            rows += [Row(text, (name,), f"image {number}") for text in texts]
    return listing_of_files(names, ImageFolder(source.images, path.parent), rows=rows, split=split)


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


def is_xm3600(path: Path) -> bool:
    """Say whether a path is XM3600's file of captions, or a folder with it."""
    return _XM3600_KEY in first_object(path / _XM3600 if path.is_dir() else path)


def list_xm3600(source: RetrievalSource) -> Listing:
    """List the images `KEY.jpg` of a folder, or of `images` in it, and captions by language."""
    choose_split((), source.split, source.file)
    path = source.file / _XM3600 if source.file.is_dir() else source.file
    names, rows = [], []
    for place, record in objects_of(path):
        name = record.get(_XM3600_KEY)
        if not isinstance(name, str):
            raise DataError(f'{path}, {place} has no "{_XM3600_KEY}"; found {", ".join(record)}')
        names.append(name)
        for language, value in record.items():
            if isinstance(value, dict) and "caption" in value:
                texts = texts_in(value["caption"], f"{path}, {place}, {language!r}")
                rows += [Row(text, (name,), place, language) for text in texts]
    # The captions of each language were written in view of the image alone: no translations.
    return listing_of_files(names, _images(source, path.parent), rows=rows, translated=False)


def is_xtd10(path: Path) -> bool:
    """Say whether a path is a folder with XTD10's list of images and its captions."""
    return (path / _XTD_NAMES).is_file() and any(path.glob(f"{_XTD_CAPTIONS}*.txt"))


def list_xtd10(source: RetrievalSource) -> Listing:
    """List the images, which are COCO's, and the caption of each in every language there is."""
    folder = source.file
    choose_split((), source.split, folder)
    names = [line.strip() for _, line in lines_of(folder / _XTD_NAMES) if line.strip()]
    rows = []
    for file in sorted(folder.glob(f"{_XTD_CAPTIONS}*.txt")):
        code = file.stem.removeprefix(_XTD_CAPTIONS)
        texts = lines_in(decoded(file.read_bytes(), str(file)).rstrip("\r\n"))
        if len(texts) != len(names):
            raise DataError(
                f"{file} has {len(texts)} captions; expected {len(names)}, one for each image of "
                f"{_XTD_NAMES}"
            )
        rows += [
            Row(text, (name,), f"line {number}", _XTD_CODES.get(code, code))
            for number, (text, name) in enumerate(zip(texts, names, strict=True), start=1)
        ]
    return listing_of_files(names, _images(source, folder), rows=rows)


def _images(source: RetrievalSource, folder: Path) -> ImageFolder:
    inside = folder / "images"
    return ImageFolder(source.images, inside if inside.is_dir() else folder)


def is_numbered_captions(path: Path) -> bool:
    """Say whether a path is such a file of captions, or a folder with one."""
    return bool(_caption_files(path))


def list_numbered_captions(source: RetrievalSource) -> Listing:
    """List the images of a split, or all that the captions name where there is no list of ids."""
    files = _caption_files(source.file)
    # Of COCO-CN's those that were written for the images.
    main = [file for file in files if file.name == _MAIN]
    if len(files) != 1 and not main:
        several = ", ".join(file.name for file in files)
        raise DataError(f"{source.file} has several files of captions: {several}; give one of them")
    path = (main or files)[0]
    rows = list(_numbered_rows(path))
    folder = ImageFolder(source.images, path.parent)
    named = dict.fromkeys(name for row in rows for name in row.image_ids)
    found = _lists_near(path)
    lists = {of: names for of, names in found.items() if not named.keys().isdisjoint(names[1])}
    split = choose_split(lists, source.split, source.file)
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


def _numbered_rows(path: Path) -> Iterator[Row]:
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
