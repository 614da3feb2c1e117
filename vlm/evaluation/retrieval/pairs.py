"""What a retrieval evaluation asks: images, texts by language, and which belong together.

Its fingerprint names the question: two scores compare only where fingerprints are equal.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vlm.data.config import CACHE_GIB, SourceConfig
from vlm.data.sample import Sample
from vlm.data.source import open_source
from vlm.embedding.bulk import digest_of_image
from vlm.errors import DataError
from vlm.evaluation.config import DuplicatePolicy
from vlm.images.decoding import ImageSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """The texts of one language."""

    texts: Sequence[str]
    matches: Int[np.ndarray, "matches 2"]
    """Pairs (text, image) that belong together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalPairs:
    """A retrieval benchmark."""

    images: Sequence[ImageSource]
    """Encoded images, or where they lie."""
    addresses: Sequence[str] = ()
    """Where each image lies that is no file of its own: `FOLDER/SHARD#ROW` of a data folder,
    `PATH#ID` of a benchmark; empty if all are files."""
    texts: Mapping[str, Texts]
    """The texts by language code."""
    concepts: Sequence[str] = ()
    """What each image of a data folder shows; empty for the files of a benchmark."""
    image_names: Sequence[str] = ()
    """The id that a benchmark's files give each image, all different."""
    duplicates: DuplicatePolicy = "by id"
    """Which images are correct where several have the same text."""
    cleaning: str = "none"
    """What was done to the texts."""
    kind: str = "data folder"
    """`data folder`, or the kind of benchmark the files are."""
    split: str = ""
    """Empty where the files have no splits."""
    findings: Mapping[str, Any] = field(default_factory=dict)
    """What was found in a benchmark's files: counts that are not 0 (`images_listed`,
    `captions_listed`, `missing_images`, `unknown_ids`, `empty_captions`, `duplicate_captions`,
    `duplicate_image_ids`, `tagged_captions`, `images_without_caption`), the first case of each
    fault in `examples`, and decisions made in reading in `notes`."""
    translations: Mapping[tuple[str, str], Int64[np.ndarray, "pairs 2"]] = field(
        default_factory=dict
    )
    """By two languages, pairs (text of the first, text of the second) with one meaning, each once.
    The first language is English if there is English, else the first of all; empty if no two
    languages have such texts."""

    def describe_findings(self) -> list[str]:
        """Return a phrase for everything that was found in a benchmark's files."""
        phrases = [
            f"{number:,} {name.replace('_', ' ')}"
            for name, number in self.findings.items()
            if isinstance(number, int)
        ]
        examples = self.findings.get("examples", {})
        first = [f"{name.replace('_', ' ')} such as {case}" for name, case in examples.items()]
        return [*phrases, *first, *self.findings.get("notes", ())]


def pairs_of_split(
    config: SourceConfig, *, languages: Sequence[str], cache_gib: float = CACHE_GIB
) -> RetrievalPairs:
    """Make a benchmark of a data folder's split.

    Each concept is asked for once by its main caption in each language; all its images are
    correct answers, and its caption is the correct answer for each of them.

    Args:
        config: A data folder with a manifest, here or at a place.
        languages: The languages to ask in; those that no sample has are left out.
        cache_gib: Disk space for copies of what is at a place, in GiB.

    Raises:
        DataError: the split cannot be read, a condition is not one or asks for what no sample
            has, or nothing is left.
    """
    source = open_source(config, cache_gib=cache_gib)
    samples = list(source)
    asked: dict[str, dict[str, str]] = {}  # by language and concept, its first main caption
    for language in languages:
        for sample in samples:
            if captions := sample.captions.get(language):
                asked.setdefault(language, {}).setdefault(sample.concept, captions[0])
    texts = {
        language: _texts_of(samples, language, concepts) for language, concepts in asked.items()
    }
    if not texts:
        codes = (code for sample in samples for code, texts in sample.captions.items() if texts)
        known = ", ".join(dict.fromkeys(codes))
        raise DataError(
            f"{source.name} has no sample with a caption in {' or '.join(languages)}"
            + (f" where {' and '.join(config.where)}" if config.where else "")
            + (f"; expected some of {known}" if known else "")
        )
    return RetrievalPairs(
        images=[sample.image for sample in samples],
        addresses=[sample.address for sample in samples],
        concepts=[sample.concept for sample in samples],
        texts=texts,
        duplicates="by string",
        split=config.split,
        translations=translations_of(_of_concepts(asked)),
    )


def correct_pairs(
    texts: Sequence[str], pairs: Int64[np.ndarray, "pairs 2"], policy: DuplicatePolicy
) -> Int64[np.ndarray, "matches 2"]:
    """Return the pairs (text, image) that count as correct, by text and image.

    * `by id`: the images that the file gives a text, and no others. Chinese-CLIP's
      `eval/evaluation.py` asks so: each caption is its own text, known by its `text_id`.
    * `by string`: every image that has an equal caption. M2-Encoder's `eval_retrieval.py` keys
      its correct answers by the text itself, so in text-to-image a caption that occurs with two
      images finds either. (In image-to-text that script knows only the last of equal captions;
      here all of them are correct.)
    """
    if policy == "by id":
        return np.unique(pairs, axis=0)
    numbers: dict[str, int] = {}
    of_text = [numbers.setdefault(text, len(numbers)) for text in texts]
    images: list[set[int]] = [set() for _ in numbers]
    for text, image in pairs.tolist():
        images[of_text[text]].add(image)
    matches = [
        (text, image) for text, number in enumerate(of_text) for image in sorted(images[number])
    ]
    return np.array(matches, dtype=np.int64).reshape(-1, 2)


def linked_groups(
    matches: Int[np.ndarray, "matches 2"], *, texts: int, images: int
) -> tuple[Int64[np.ndarray, " texts"], Int64[np.ndarray, " images"]]:
    """Number the sets of texts and images that correct pairs link, directly or through others.

    A bootstrap draws such sets: an image with its five captions, or a concept with its caption and
    all its images.

    Args:
        matches: Pairs (text, image) that belong together.
        texts: Number of texts.
        images: Number of images.

    Returns:
        The set of each text, and that of each image.
    """
    ends = matches[:, 0], matches[:, 1] + texts  # one graph: images are the nodes after the texts
    graph = coo_array((np.ones(len(matches), bool), ends), shape=(texts + images,) * 2)
    # Sets are numbered by their first node, so that the same pairs are always drawn alike.
    of_node = connected_components(graph, directed=False)[1].astype(np.int64)
    return of_node[:texts], of_node[texts:]


def _texts_of(samples: Sequence[Sample], language: str, asked: Mapping[str, str]) -> Texts:
    numbers = _numbers_of(asked)
    matches = [
        (numbers[asked[sample.concept]], image)
        for image, sample in enumerate(samples)
        if sample.captions.get(language)
    ]
    return Texts(texts=list(numbers), matches=np.array(matches, dtype=np.int64).reshape(-1, 2))


def _numbers_of(asked: Mapping[str, str]) -> dict[str, int]:
    """Number the queries; concepts with one caption share their query."""
    return {text: number for number, text in enumerate(dict.fromkeys(asked.values()))}


def _of_concepts(
    asked: Mapping[str, Mapping[str, str]],
) -> dict[str, Int64[np.ndarray, "concepts 3"]]:
    """Return by language rows (text, concept, 0): a concept has one caption, so turn 0."""
    places: dict[str, int] = {}
    found = {}
    for language, of_language in asked.items():
        numbers = _numbers_of(of_language)
        rows = [
            (numbers[text], places.setdefault(concept, len(places)), 0)
            for concept, text in of_language.items()
        ]
        found[language] = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return found


def translations_of(
    captions: Mapping[str, Int64[np.ndarray, "_ 3"]],
) -> dict[tuple[str, str], Int64[np.ndarray, "pairs 2"]]:
    """Pair the captions of an image in one language with those of the same turn in another.

    Args:
        captions: By language, rows (text, image, turn), or a concept instead of an image; no two
            rows of a language have both in common. The turn counts the captions of the image in
            that language from 0, in the order of the file.
    """
    if len(captions) < 2:
        return {}
    first = "en" if "en" in captions else next(iter(captions))
    most = 1 + max(rows[:, 2].max(initial=0) for rows in captions.values())
    keys = {language: rows[:, 1] * most + rows[:, 2] for language, rows in captions.items()}
    found = {}
    for other in (language for language in captions if language != first):
        _, here, there = np.intersect1d(
            keys[first], keys[other], assume_unique=True, return_indices=True
        )
        pairs = np.stack([captions[first][here, 0], captions[other][there, 0]], axis=1)
        if len(pairs):
            found[first, other] = np.unique(pairs, axis=0)
    return found


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

    `digests` are what `BulkEmbedder.digests_of` gave for its images; None to read them.

    Raises:
        DataError: no caption of a language has a correct image, or an image cannot be read.
    """
    if digests is None:
        digests = [digest_of_image(image) for image in pairs.images]
    images = hashlib.sha256(b"".join(digests)).hexdigest()
    return {
        language: _question(pairs, own, language, images) for language, own in pairs.texts.items()
    }


def _question(pairs: RetrievalPairs, asked: Texts, language: str, images: str) -> Question:
    if not len(asked.matches):
        raise DataError(f"no caption in {language} has a correct image; expected at least one")
    of_image = np.bincount(asked.matches[:, 1], minlength=len(pairs.images))
    with_caption = of_image[of_image > 0]
    mean = round(float(with_caption.mean()), 4)
    content = {
        "images": images,
        "texts": list(asked.texts),
        "matches": np.unique(asked.matches, axis=0).tolist(),
    }
    return Question(
        language=language,
        images=len(pairs.images),
        captions=len(asked.texts),
        captions_per_image=(int(with_caption.min()), mean, int(with_caption.max())),
        images_without_caption=int((of_image == 0).sum()),
        duplicates=pairs.duplicates,
        cleaning=pairs.cleaning,
        sha256=_digest(content),
    )


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
