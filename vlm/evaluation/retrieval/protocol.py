"""What a retrieval score depends on beside the model, with a fingerprint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from vlm.embedding.bulk import digest_of_image
from vlm.embedding.embedder import Embedder
from vlm.errors import DataError
from vlm.evaluation.config import DuplicatePolicy
from vlm.evaluation.retrieval.pairs import RetrievalPairs
from vlm.images.decoding import ImageSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked of a model in one language: two scores compare if they asked the same."""

    language: str
    images: int
    captions: int
    captions_per_image: tuple[int, float, int]
    """Fewest, mean and most right captions of an image that has one."""
    images_without_caption: int
    """Images that are wrong answers only."""
    duplicates: DuplicatePolicy
    """Which images are right where several have the same caption."""
    cleaning: str
    """What was done to the captions before the model's own tokenizer."""
    sha256: str
    """Of the captions in their order, the right pairs, and the images' bytes."""

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name the question."""
        return _digest(asdict(self))[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How a model takes in what it is asked."""

    model: str
    """Fingerprint of the bundle."""
    embed_dim: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    context_length: int
    """Longest text in tokens."""
    truncated_share: float
    """Share in [0, 1] of the captions that were cut to it."""
    transform: Mapping[str, Any]
    """open_clip's description of the image transform."""
    logit_scale: float
    """What cosines are multiplied with to be the model's logits."""
    logit_bias: float
    """What is then added; 0 for a model without a bias."""


def question_of(
    images: Sequence[ImageSource],
    texts: Sequence[str],
    matches: Int[np.ndarray, "matches 2"],
    *,
    language: str,
    duplicates: DuplicatePolicy = "by id",
    cleaning: str = "none",
    digests: Sequence[bytes] | None = None,
) -> Question:
    """Describe a question.

    Args:
        images: The images, in the order of the benchmark.
        texts: The captions.
        matches: Pairs (caption, image) that are right.
        language: The captions' language.
        duplicates: Which policy gave the pairs.
        cleaning: What was done to the captions.
        digests: What `BulkEmbedder.digests_of` gave for the images; None to read them.

    Raises:
        DataError: no caption has a right image, or an image cannot be read.
    """
    if not len(matches):
        raise DataError(f"no caption in {language} has a right image; expected some")
    of_image = np.bincount(matches[:, 1], minlength=len(images))
    with_caption = of_image[of_image > 0]
    content = {
        "images": sha256_of_images(images, digests),
        "texts": list(texts),
        "matches": np.unique(matches, axis=0).tolist(),
    }
    return Question(
        language=language,
        images=len(images),
        captions=len(texts),
        captions_per_image=(
            int(with_caption.min()),
            round(float(with_caption.mean()), 4),
            int(with_caption.max()),
        ),
        images_without_caption=int((of_image == 0).sum()),
        duplicates=duplicates,
        cleaning=cleaning,
        sha256=_digest(content),
    )


def questions_of(
    pairs: RetrievalPairs, *, digests: Sequence[bytes] | None = None
) -> dict[str, Question]:
    """Describe what a benchmark asks, by language.

    Args:
        pairs: The benchmark.
        digests: What `BulkEmbedder.digests_of` gave for its images; None to read them.

    Raises:
        DataError: a language has no right image at all, or an image cannot be read.
    """
    if digests is None:
        digests = [digest_of_image(image) for image in pairs.images]
    return {
        language: question_of(
            pairs.images,
            of_language.texts,
            of_language.matches,
            language=language,
            duplicates=pairs.duplicates,
            cleaning=pairs.cleaning,
            digests=digests,
        )
        for language, of_language in pairs.texts.items()
    }


def reading_of(embedder: Embedder, texts: Sequence[str]) -> Reading:
    """Describe how a model takes in captions and images.

    Args:
        embedder: The model.
        texts: All captions that it is asked.
    """
    tokenizer = embedder.tokenizer
    bias = embedder.bundle.model.logit_bias
    around = 1 + (tokenizer.special_ids.begin_of_text is not None)
    room = tokenizer.context_length - around
    cut = sum(len(row) > room for row in tokenizer.split(texts))
    return Reading(
        model=embedder.fingerprint,
        embed_dim=embedder.embed_dim,
        tokenizer=tokenizer.fingerprint,
        context_length=tokenizer.context_length,
        truncated_share=cut / max(1, len(texts)),
        transform=dict(embedder.bundle.preprocess_cfg),
        logit_scale=float(embedder.bundle.model.log_logit_scale.detach().exp()),
        logit_bias=0.0 if bias is None else float(bias.detach()),
    )


def sha256_of_images(images: Sequence[ImageSource], digests: Sequence[bytes] | None = None) -> str:
    """Return a hash of the encoded images, or of the RGB pixels of opened ones, in their order.

    Args:
        images: The images.
        digests: What `BulkEmbedder.digests_of` gave for them; None to read them.
    """
    if digests is None:
        digests = [digest_of_image(image) for image in images]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
