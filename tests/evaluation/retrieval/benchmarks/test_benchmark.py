"""Which pairs are right under each policy, and when a benchmark with faults is refused."""

import numpy as np
import pytest

from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.benchmark import Captions, Findings, check, correct_pairs

TEXTS = ["a cat", "a dog", "a cat", "a cat"]
CAPTIONS = Captions(texts=TEXTS, pairs=np.array([[0, 0], [1, 0], [1, 2], [2, 1], [3, 0]]))


def test_by_id_a_text_has_the_images_that_the_file_gives_it():
    assert correct_pairs(CAPTIONS, "by id").tolist() == CAPTIONS.pairs.tolist()


def test_by_string_a_text_has_every_image_with_an_equal_text():
    expected = {
        (text, image)
        for text, string in enumerate(TEXTS)
        for other, image in CAPTIONS.pairs.tolist()
        if TEXTS[other] == string
    }
    pairs = correct_pairs(CAPTIONS, "by string")
    assert set(map(tuple, pairs.tolist())) == expected
    assert len(pairs) == len(expected)
    assert pairs.dtype == np.int64


def test_no_captions_have_no_pairs():
    empty = Captions(texts=[], pairs=np.zeros((0, 2), np.int64))
    assert correct_pairs(empty, "by id").shape == correct_pairs(empty, "by string").shape == (0, 2)


def test_every_count_beyond_the_share_is_named_with_its_first_case():
    findings = Findings(
        images_listed=10, captions_listed=50, missing_images=1, unknown_ids=6,
        empty_captions=5, duplicate_captions=50, duplicate_image_ids=10,
        images_without_caption=10, examples={"unknown_ids": "line 7, 'x'"},
    )  # fmt: skip
    with pytest.raises(DataError) as caught:
        check(findings, source="flickr")
    assert str(caught.value) == (
        "flickr: 1 of 10 images are not on the disk; 6 of 50 captions name an image that is not "
        "listed (first: line 7, 'x'); 5 of 50 captions are empty; at most 0.0% may be so"
    )
    with pytest.raises(DataError, match=r"^flickr: 6 of 50 captions name"):
        check(findings, source="flickr", allowed_share=0.1)
    check(findings, source="flickr", allowed_share=0.12)
