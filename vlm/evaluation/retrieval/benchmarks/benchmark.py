"""What a benchmark of images and captions is, whatever file it came from, and what it lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.images import Images


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """The captions of one language, one a row, in the order of the file."""

    texts: Sequence[str]
    pairs: Int64[np.ndarray, "pairs 2"]
    """Pairs (text, image) as the file has them, by text; MUGE's texts have several images."""
    turns: Int64[np.ndarray, " pairs"] | None = None
    """Of each pair, how many captions of the image in this language the file has before the
    text, those included that were left out: one that says the same in another language has the
    same turn. None where captions of different languages were written apart from each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What was found wrong or worth knowing, counted; nothing of it is in the benchmark."""

    images_listed: int
    """Different images that the files name."""
    captions_listed: int
    missing_images: int = 0
    """Images that are not on the disk; they are left out, and so are captions of them alone."""
    unknown_ids: int = 0
    """Captions of which an image is in no list of the benchmark; such pairs are left out."""
    empty_captions: int = 0
    """Captions without a letter or sign; they are left out."""
    duplicate_captions: int = 0
    """Captions equal to an earlier one of their language; they stay."""
    duplicate_image_ids: int = 0
    """Images listed again under an id; the last one counts, as in an LMDB."""
    tagged_captions: int = 0
    """Captions from which part-of-speech tags were removed."""
    images_without_caption: int = 0
    """Images that no caption describes; they stay, as wrong answers."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """The first case of a count that is not 0."""
    notes: Sequence[str] = ()
    """Decisions that were made in reading, such as the language that was recognised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Images, and captions by language."""

    name: str
    """The file or folder, and the split if there are several."""
    kind: str
    """Which kind of files it came from."""
    split: str
    """Empty where the files have no splits."""
    images: Images
    """A sequence of paths or encoded bytes, read when asked for; it can be sent to workers."""
    image_ids: Sequence[str]
    """The id of each image, all different."""
    captions: Mapping[str, Captions]
    findings: Findings
    files: tuple[Path, ...]
    """The files with captions, lists and packed images, for hashing; no single images."""
    cleaning: str
    """What was done to the texts."""


def check(findings: Findings, *, source: str, allowed_share: float = 0.0) -> None:
    """Refuse a benchmark of which too much is missing; duplicates are only reported.

    Args:
        findings: What was found.
        source: What to call the benchmark.
        allowed_share: The share in [0, 1] of images that may be missing, and of captions that
            may be empty or name unknown images.

    Raises:
        DataError: names each count beyond the share, with its first case.
    """
    faults = []
    for name, count, total, what in (
        ("missing_images", findings.missing_images, findings.images_listed,
         "images are not on the disk"),
        ("unknown_ids", findings.unknown_ids, findings.captions_listed,
         "captions name an image that is not listed"),
        ("empty_captions", findings.empty_captions, findings.captions_listed,
         "captions are empty"),
    ):  # fmt: skip
        if count > allowed_share * total:
            example = findings.examples.get(name, "")
            faults.append(f"{count} of {total} {what}" + (f" (first: {example})" * bool(example)))
    if faults:
        raise DataError(f"{source}: {'; '.join(faults)}; at most {allowed_share:.1%} may be so")
