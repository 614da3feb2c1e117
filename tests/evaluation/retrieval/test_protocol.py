from dataclasses import replace

import numpy as np
import pytest

from tests.builders import encoded, make_image
from vlm.embedding.bulk import BulkEmbedder
from vlm.errors import DataError
from vlm.evaluation.reading import reading_of
from vlm.evaluation.retrieval.pairs import RetrievalPairs, Texts, correct_pairs, questions_of

IMAGES = [encoded(make_image(number)) for number in range(4)]
TEXTS = ["a cat", "the same", "the same", "a dog"]
PAIRS = np.array([[0, 0], [1, 0], [2, 1], [3, 2]])


def question(*, images=IMAGES, texts=TEXTS, matches=PAIRS, language="en", digests=None, **changes):
    asked = Texts(texts=texts, matches=matches)
    pairs = RetrievalPairs(images=images, texts={language: asked}, **changes)
    return questions_of(pairs, digests=digests)[language]


def test_a_question_counts_images_captions_and_pairs():
    asked = question()
    assert (asked.images, asked.captions, asked.images_without_caption) == (4, 4, 1)
    assert asked.captions_per_image == (1, 1.3333, 2)


def test_the_same_question_has_the_same_fingerprint_wherever_its_images_lie(tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, content in zip(paths, IMAGES, strict=True):
        path.write_bytes(content)
    assert question(images=paths).fingerprint == question().fingerprint
    assert question(matches=PAIRS[::-1]).fingerprint == question().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"texts": [*TEXTS[:3], "a cow"]},
        {"images": [*IMAGES[:3], IMAGES[0]]},
        {"images": IMAGES[:3]},
        {"matches": PAIRS[:3]},
        {"language": "zh"},
        {"duplicates": "by string"},
        {"cleaning": "lower case"},
    ],
    ids=" ".join,
)
def test_whatever_changes_a_score_changes_the_fingerprint(changes):
    assert question(**changes).fingerprint != question().fingerprint


def test_the_policy_of_duplicates_is_in_the_fingerprint_by_what_it_does():
    by_id, by_string = (
        question(matches=correct_pairs(TEXTS, PAIRS, policy), duplicates=policy)
        for policy in ("by id", "by string")
    )
    assert by_id.captions_per_image[2] == 2
    assert by_string.captions_per_image == (1, 2.0, 3)
    assert replace(by_string, duplicates="by id").fingerprint != by_id.fingerprint


def test_a_question_without_correct_images_is_refused():
    with pytest.raises(DataError, match="no caption in en has a correct image"):
        question(matches=PAIRS[:0])


def test_images_hash_by_their_bytes_or_pixels():
    opened = [make_image(number) for number in range(4)]
    assert question(images=opened) == question(images=[each.copy() for each in opened])
    assert question(images=opened) != question(images=opened[::-1])


def test_digests_take_the_place_of_the_images(embedder):
    digests = BulkEmbedder(embedder).digests_of(IMAGES)
    assert question(images=[b""] * 4, digests=digests) == question()


def test_the_hash_of_a_question_stays_what_it_was():
    asked = question(images=[b"one", b"two", b"three"], matches=PAIRS[:3])
    assert asked.sha256 == "abfda2de7ce1ab35c44173cbd132980e2982e009c8365425d1d6c904e5fac802"


def test_an_image_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file"):
        question(images=[*IMAGES[:3], tmp_path / "gone.png"])


def test_a_reading_has_the_ratio_of_truncated_captions(embedder):
    long = "red apple " * 40
    reading = reading_of(embedder, ["red apple", long, long, "小狗"])
    assert reading.truncated_share == 0.5
    assert reading.context_length == embedder.tokenizer.context_length
    assert reading.embed_dim == embedder.embed_dim
    assert reading.transform == embedder.bundle.preprocess_cfg
