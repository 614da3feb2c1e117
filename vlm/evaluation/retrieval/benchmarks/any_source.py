"""Any source of images with captions as a benchmark: each caption is asked for by itself."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from vlm.data.fields import UNKNOWN_LANGUAGE
from vlm.data.source import Source, open_source
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.assembling import Listing, Row
from vlm.records.texts import as_text

_COLUMNS = ("uid", "captions", "path", "error")


@dataclass(frozen=True)
class SourceImages:
    """Images of samples."""

    samples: Source
    places: Int64[np.ndarray, "images 2"]
    """Which shard, and the row in it."""

    def __call__(self, position: int) -> bytes:
        """Read the image of a sample."""
        shard, row = self.places[position].tolist()
        return self.samples.at(shard, row).image


def list_source(source: RetrievalSource) -> Listing:
    """List the images and captions of a source by its index; rows of one image file are one image.

    Captions in a language that was not recognised are left out, and counted.
    """
    samples = open_source(source.config())
    places: dict[str, tuple[int, int]] = {}
    rows: list[Row] = []
    unusable: list[str] = []
    unknown = 0
    for shard in range(len(samples.sizes)):
        for row, found in enumerate(samples.rows(shard, _COLUMNS)):
            if reason := _why_unusable(found):
                unusable.append(reason)
                continue
            name = as_text(os.fsdecode(found["path"])) if found["path"] else found["uid"]
            places.setdefault(name, (shard, row))
            captions: Mapping[str, Sequence[str]] = dict(found["captions"])
            unknown += len(captions.get(UNKNOWN_LANGUAGE, ()))
            rows += [
                Row(text, (name,), found["uid"], language)
                for language, texts in captions.items()
                for text in texts
                if language != UNKNOWN_LANGUAGE
            ]
    return Listing(
        split=samples.config.split,
        image_ids=list(places),
        read=SourceImages(samples, np.array(list(places.values()), np.int64).reshape(-1, 2)),
        unusable=unusable,
        rows=rows,
        notes=[f"{unknown:,} captions in a language that was not recognised"] if unknown else (),
    )


def _why_unusable(found: Mapping[str, Any]) -> str:
    if found["error"] is not None:
        return str(found["error"])
    path = os.fsdecode(found["path"]) if found["path"] else ""
    return f"{path} is missing" if path and not os.path.isfile(path) else ""
