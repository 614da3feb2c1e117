"""What a retrieval benchmark asks, with a fingerprint: scores compare only where they are equal."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlm.embedding.bulk import digest_of_image
from vlm.errors import DataError
from vlm.evaluation.config import DuplicatePolicy
from vlm.evaluation.retrieval.pairs import RetrievalPairs, Texts


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked of a model in one language: two scores compare if they asked the same."""

    language: str
    images: int
    captions: int
    captions_per_image: tuple[int, float, int]
    """Fewest, mean and most correct captions of an image that has one."""
    images_without_caption: int
    """Images that can only be wrong answers."""
    duplicates: DuplicatePolicy
    """Which images are correct where several have the same caption."""
    cleaning: str
    """What was done to the captions before the model's own tokenizer."""
    sha256: str
    """Of the captions in their order, the correct pairs, and the images' bytes."""

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name the question."""
        return _digest(asdict(self))[:12]


def questions_of(
    pairs: RetrievalPairs, *, digests: Sequence[bytes] | None = None
) -> dict[str, Question]:
    """Describe what a benchmark asks, by language.

    Args:
        pairs: The benchmark.
        digests: What `BulkEmbedder.digests_of` gave for its images; None to read them.

    Raises:
        DataError: no caption of a language has a correct image, or an image cannot be read.
    """
    if digests is None:
        digests = [digest_of_image(image) for image in pairs.images]
    images = hashlib.sha256(b"".join(digests)).hexdigest()
    return {
        language: _question(pairs, of_language, language, images)
        for language, of_language in pairs.texts.items()
    }


def _question(pairs: RetrievalPairs, asked: Texts, language: str, images: str) -> Question:
    if not len(asked.matches):
        raise DataError(f"no caption in {language} has a correct image; expected at least one")
    of_image = np.bincount(asked.matches[:, 1], minlength=len(pairs.images))
    with_caption = of_image[of_image > 0]
    content = {
        "images": images,
        "texts": list(asked.texts),
        "matches": np.unique(asked.matches, axis=0).tolist(),
    }
    return Question(
        language=language,
        images=len(pairs.images),
        captions=len(asked.texts),
        captions_per_image=(
            int(with_caption.min()),
            round(float(with_caption.mean()), 4),
            int(with_caption.max()),
        ),
        images_without_caption=int((of_image == 0).sum()),
        duplicates=pairs.duplicates,
        cleaning=pairs.cleaning,
        sha256=_digest(content),
    )


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
