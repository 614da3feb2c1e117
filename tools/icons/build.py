"""Building `data/icons` from its sources: shards of every split, manifest, groups and licences."""

import json
import logging
from collections import Counter, defaultdict
from importlib import resources
from pathlib import Path

from tools.data_folder import require_replaceable, write_data_folder
from tools.drawings import require_svg_renderer
from tools.icons.concepts import read_concepts, read_groups
from tools.icons.packages import CAPTIONS
from tools.icons.styles import HELD_OUT_STYLE, Drawing, distinct_drawings, open_icon_sets
from tools.packages import fetch, read_archive
from tools.splits import split_of
from vlm.data.sample import Sample

logger = logging.getLogger(__name__)

LICENCE = "Apache-2.0"
CLASSES_NAME = "classes.json"
LICENCES_NAME = "LICENCES.md"
LICENCE_TEXT_NAME = f"{LICENCE}.txt"


def build_icons(out: Path, *, cache: Path) -> None:
    """Build the bilingual icon set from its pinned sources, the same bytes every time.

    Args:
        out: The data folder to write; an icon data folder already there is replaced.
        cache: Folder of the downloads, used again by the next build.

    Raises:
        DataError: `out` holds something else, a source cannot be obtained, or a tool is missing.
        VlmError: the disk is full or `out` cannot be written.
    """
    files = (CLASSES_NAME, LICENCES_NAME, LICENCE_TEXT_NAME)
    require_replaceable(out, kind="icon", files=files)
    require_svg_renderer()
    icon_park = read_archive(fetch(CAPTIONS, cache), pattern=r"(icons\.json|LICENSE)$")
    concepts = read_concepts(icon_park["icons.json"])
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    styles: Counter[str] = Counter()
    for drawing in distinct_drawings(open_icon_sets(cache), concepts):
        split = split_of(
            drawing.style,
            drawing.icon,
            new_style=drawing.style == HELD_OUT_STYLE,
            new_concept=drawing.concept.is_new,
        )
        samples[split].append(_sample(drawing))
        styles[drawing.style] += 1
    for style, count in styles.items():
        logger.info("%s: %d images", style, count)
    contents = (_classes(), _licences(), icon_park["LICENSE"])
    write_data_folder(out, samples, dict(zip(files, contents, strict=True)))


def _sample(drawing: Drawing) -> Sample:
    return Sample(
        uid=f"{drawing.style}/{drawing.icon}",
        image=drawing.image,
        captions=drawing.concept.captions,
        concept=drawing.concept.key,
        source=drawing.style,
        licence=LICENCE,
        labels={"group": drawing.concept.group},
    )


def _classes() -> bytes:
    groups = {group.key: group.names for group in read_groups()}
    return (json.dumps({"groups": groups}, ensure_ascii=False, indent=1) + "\n").encode()


def _licences() -> bytes:
    return resources.files("tools.icons").joinpath(LICENCES_NAME).read_bytes()
