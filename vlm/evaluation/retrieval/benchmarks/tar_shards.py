"""CLIP_benchmark's WebDatasets for retrieval: tar files of images with `.txt` or `.json`."""

from pathlib import Path

import numpy as np

from vlm.data.fields import texts_by_tag
from vlm.data.layout import tars_in
from vlm.data.scanning import IMAGE_EXTENSIONS, record_in
from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Row, choose_split
from vlm.evaluation.retrieval.benchmarks.images import TarMembers
from vlm.records.tars import is_tar, members_by_key


def is_tar_shards(path: Path) -> bool:
    """Say whether a path is a tar file, or a folder with some, in it or in a folder a split."""
    return is_tar(path) or bool(tars_in(path))


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
        content, samples = members_by_key(path)
        stem = Path(path.name.removesuffix(".gz")).stem
        for key, members in samples.items():
            name, where = f"{stem}/{key}", f"{path}, {key!r}"
            images = [members[kind] for kind in IMAGE_EXTENSIONS & members.keys()]
            if len(images) != 1:
                raise DataError(f"{where} needs one image, has {', '.join(sorted(members))}")
            spans.append((number, *images[0]))
            names.append(name)
            captions = texts_by_tag(record_in(content, members, where), where)
            if captions is None:
                if "cls" in members:
                    raise DataError(f"{where} has class labels, so it is no retrieval benchmark")
                raise DataError(f"{where} has no captions; expected a .txt or a .json with some")
            rows += [
                Row(text, (name,), f"sample {len(names)}", language)
                for language, texts in captions.items()
                for text in texts
            ]
    read = TarMembers(tuple(paths), np.array(spans, dtype=np.int64).reshape(-1, 3))
    return Listing(split=split, image_ids=names, read=read, rows=rows)
