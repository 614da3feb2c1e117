"""Building `data/emoji` from its sources: shards of every split, manifest, classes and licences."""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from tools.data_folder import require_replaceable, write_data_folder
from tools.drawings import require_svg_renderer
from tools.emoji.captions import read_keywords
from tools.emoji.classes import class_table
from tools.emoji.concepts import Concept, read_concepts
from tools.emoji.flags import require_flag_renderer
from tools.emoji.packages import CAPTIONS, KEYWORDS
from tools.emoji.splits import HELD_OUT_STYLE, held_out_concepts
from tools.emoji.styles import Drawing, distinct_drawings, open_drawing_sets
from tools.packages import fetch, read_archive
from tools.splits import split_of
from vlm.data.sample import Sample

logger = logging.getLogger(__name__)

CLASSES_NAME = "classes.json"
LICENCES_NAME = "LICENCES.md"
QUESTIONS_NAME = "questions.yaml"


def build_emoji(out: Path, *, cache: Path) -> None:
    """Build the bilingual emoji set from its pinned sources, the same bytes every time.

    Args:
        out: The data folder to write; an emoji data folder already there is replaced, but for its
            questions, which were written by hand.
        cache: Folder of the downloads, used again by the next build.

    Raises:
        DataError: `out` holds something else, a source cannot be obtained, or a tool is missing.
        VlmError: the disk is full or `out` cannot be written.
    """
    require_replaceable(
        out, kind="emoji", files=(CLASSES_NAME, LICENCES_NAME), optional=(QUESTIONS_NAME,)
    )
    questions = out / QUESTIONS_NAME
    kept = {QUESTIONS_NAME: questions.read_bytes()} if questions.is_file() else {}
    require_svg_renderer()
    require_flag_renderer()
    captions = fetch(CAPTIONS, cache)
    keywords = read_keywords(read_archive(fetch(KEYWORDS, cache), pattern=r"dist/.+\.json$"))
    concepts = read_concepts(read_archive(captions, pattern=r"(en|zh|zh-hant|meta)/"), keywords)
    drawings = distinct_drawings(open_drawing_sets(concepts, cache))
    write_data_folder(out, _samples_by_split(drawings, concepts), _files() | kept)


def _samples_by_split(
    drawings: Iterable[Drawing], concepts: Sequence[Concept]
) -> dict[str, list[Sample]]:
    held_out = held_out_concepts(concepts)
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    styles: Counter[str] = Counter()
    for drawing in drawings:
        split = split_of(
            drawing.style,
            drawing.concept.key,
            new_style=drawing.style == HELD_OUT_STYLE,
            new_concept=drawing.concept.key in held_out,
        )
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


def _files() -> dict[str, bytes]:
    classes = json.dumps(class_table().record(), ensure_ascii=False, indent=1) + "\n"
    licences = resources.files("tools.emoji").joinpath(LICENCES_NAME).read_bytes()
    return {CLASSES_NAME: classes.encode(), LICENCES_NAME: licences}
