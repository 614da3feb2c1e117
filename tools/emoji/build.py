"""Building `data/emoji` from its sources: shards of every split, manifest, classes and licences."""

import hashlib
import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from tools.emoji import packages
from tools.emoji.classes import class_table
from tools.emoji.concepts import Concept, read_concepts
from tools.emoji.drawings import require_renderers
from tools.emoji.splits import SPLITS, held_out_concepts, split_of
from tools.emoji.styles import Drawing, distinct_drawings, open_drawing_sets
from vlm.data.manifest import MANIFEST_NAME, Manifest, write_manifest
from vlm.data.sample import Sample
from vlm.data.shards import write_shards
from vlm.errors import DataError
from vlm.files import write_file, write_folder

logger = logging.getLogger(__name__)

CLASSES_NAME = "classes.json"
LICENCES_NAME = "LICENCES.md"

_SAMPLES_PER_SHARD = 2000
_EVERY_FOLDER_HOLDS = frozenset({MANIFEST_NAME, CLASSES_NAME, LICENCES_NAME})
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5}}\.tar\.gz")


def build_emoji(out: Path, *, cache: Path) -> None:
    """Build the bilingual emoji set from its pinned sources, the same bytes every time.

    Args:
        out: The data folder to write; an emoji data folder already there is replaced.
        cache: Folder of the downloads, used again by the next build.

    Raises:
        DataError: `out` holds something else, a source cannot be obtained, or a tool is missing.
        VlmError: the disk is full or `out` cannot be written.
    """
    _require_replaceable(out)
    require_renderers()
    captions = packages.fetch(packages.CAPTIONS, cache)
    concepts = read_concepts(packages.read_archive(captions, pattern=r"(en|zh|zh-hant|meta)/"))
    drawings = distinct_drawings(open_drawing_sets(concepts, cache))
    samples = _samples_by_split(drawings, concepts)
    with write_folder(out) as folder:
        _write(folder, samples)


def _require_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; --out names the data folder to write")
    found = {path.name for path in out.iterdir()}
    foreign = {name for name in found - _EVERY_FOLDER_HOLDS if not _SHARD_NAME.fullmatch(name)}
    if foreign or (found and not found >= _EVERY_FOLDER_HOLDS):
        raise DataError(
            f"{out} is there and is not an emoji data folder (it holds "
            f"{min(foreign or found)}); remove it or choose another folder"
        )


def _samples_by_split(
    drawings: Iterable[Drawing], concepts: Sequence[Concept]
) -> dict[str, list[Sample]]:
    held_out = held_out_concepts(concepts)
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    styles: Counter[str] = Counter()
    for drawing in drawings:
        split = split_of(drawing.style, drawing.concept.key, held_out=held_out)
        samples[split].append(_sample(drawing))
        if not styles[drawing.style]:
            logger.info("drawing %s", drawing.style)
        styles[drawing.style] += 1
    for style, count in styles.items():
        logger.info("%s: %d images", style, count)
    return samples


def _sample(drawing: Drawing) -> Sample:
    concept = drawing.concept
    labels = {
        "group": concept.group,
        "subgroup": concept.subgroup,
        "version": concept.version,
    }
    if concept.subgroup in class_table().class_of_subgroup:
        labels["class"] = class_table().class_of_subgroup[concept.subgroup]
    return Sample(
        uid=f"{drawing.style}/{concept.key}",
        image=drawing.image,
        captions=concept.captions,
        concept=concept.key,
        source=drawing.style,
        licence=drawing.licence,
        labels=labels,
    )


def _write(folder: Path, samples: Mapping[str, Sequence[Sample]]) -> None:
    shards = {
        split: write_shards(
            sorted(samples[split], key=_mixed_order),
            folder,
            split=split,
            samples_per_shard=_SAMPLES_PER_SHARD,
        )
        for split in SPLITS
    }
    write_manifest(folder, Manifest(splits=shards))
    classes = json.dumps(class_table().record(), ensure_ascii=False, indent=1) + "\n"
    write_file(folder / CLASSES_NAME, classes.encode())
    licences = resources.files("tools.emoji").joinpath(LICENCES_NAME).read_bytes()
    write_file(folder / LICENCES_NAME, licences)


def _mixed_order(sample: Sample) -> str:
    """Mix styles and concepts, so that every shard is a fair sample of its split."""
    return hashlib.sha256(sample.uid.encode()).hexdigest()
