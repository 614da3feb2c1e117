"""Chinese-CLIP's folders: `SPLIT_texts.jsonl` with `SPLIT_imgs.tsv` or an LMDB; MUGE is one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Row, choose_split
from vlm.evaluation.retrieval.benchmarks.images import EncodedLines, LmdbValues, open_lmdb
from vlm.records.texts import first_object, objects_of, whole_characters

_TEXTS, _IMAGES = "_texts.jsonl", "_imgs.tsv"
_COUNT = "num_images"


def is_chinese_clip(path: Path) -> bool:
    """Say whether a path is such a folder, or a text file of one."""
    if path.is_dir():
        return any(path.glob(f"*{_TEXTS}")) or any(path.glob("lmdb/*/pairs"))
    return {"text_id", "image_ids"} <= first_object(path).keys()


def list_chinese_clip(source: RetrievalSource) -> Listing:
    """List the images and texts of a split."""
    folder = source.file
    asked = source.split
    if not folder.is_dir():
        asked = asked or folder.name.removesuffix(_TEXTS)
        folder = folder.parent
    splits = [path.name.removesuffix(_TEXTS) for path in folder.glob(f"*{_TEXTS}")]
    if not splits:
        raise DataError(
            f"{folder} has its texts in the LMDB only, as pickles, which are not read because they "
            f"can run code; put the SPLIT{_TEXTS} that they were made of into it"
        )
    split = choose_split(splits, asked, folder)
    ids, read = _images_of(folder, split)
    path, rows = folder / f"{split}{_TEXTS}", []
    for place, record in objects_of(path):
        text, images = record.get("text"), record.get("image_ids")
        if not isinstance(text, str | int | float) or not isinstance(images, list):
            raise DataError(
                f'{path}, {place} has no "text" with a list of "image_ids"; found the keys '
                f"{', '.join(record)}"
            )
        text = whole_characters(str(text), f"{path}, {place}").strip("\r\n")
        rows.append(Row(text, [str(image) for image in images], place))
    return Listing(split=split, image_ids=ids, read=read, rows=rows)


def _images_of(folder: Path, split: str) -> tuple[list[str], Callable[[int], bytes]]:
    """Return ids, and what reads the image at a position."""
    path = folder / f"{split}{_IMAGES}"
    if path.is_file():
        return _scan(path)
    for store in (folder / "lmdb" / split / "imgs", folder / split / "imgs"):
        if store.is_dir():
            keys = _keys_of(store)
            return keys, LmdbValues(store, keys)
    raise DataError(f"{folder} has no images of {split!r}: expected {path.name} or lmdb/{split}")


def _scan(path: Path) -> tuple[list[str], EncodedLines]:
    ids, spans, start = [], [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            name, tab, encoded = line.rstrip(b"\r\n").partition(b"\t")
            if tab and name:
                ids.append(name.decode(errors="replace"))
                spans.append((start + len(name) + 1, len(encoded), number))
            elif line.strip():
                raise DataError(
                    f"{path}, line {number} is no image: found {line[:40]!r}, expected an id, a "
                    "tab and base64"
                )
            start += len(line)
    return ids, EncodedLines(path, np.array(spans, dtype=np.int64).reshape(-1, 3))


def _keys_of(folder: Path) -> list[str]:
    with open_lmdb(folder).begin() as transaction:
        keys = [key.decode(errors="replace") for key in transaction.cursor().iternext(values=False)]
        counted = transaction.get(_COUNT.encode())
    keys = [key for key in keys if key != _COUNT]
    if counted != str(len(keys)).encode():
        raise DataError(
            f"{folder} holds {len(keys)} images but says {counted!r}; it was not written to its "
            "end, or two images have one id"
        )
    return keys
