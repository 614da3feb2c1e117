"""Chance equals random orders; pixels equal a plain search for the nearest image."""

import math

import numpy as np
import pytest
from PIL import Image

from tests.builders import make_sample, of_split, open_split, write_split
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.baselines import chance_scores, pixel_ranks
from vlm.evaluation.retrieval.metrics import NOT_FOUND, recall_by_chance, scores_of
from vlm.evaluation.retrieval.pairs import pairs_of_split
from vlm.evaluation.retrieval.run import evaluate
from vlm.images.decoding import decode_image


@pytest.mark.parametrize(
    ("correct", "candidates", "k"), [(1, 7, 1), (3, 9, 5), (6, 8, 5), (0, 4, 2)]
)
def test_recall_by_chance_is_the_ratio_of_draws_with_a_correct_one(correct, candidates, k):
    missed = math.comb(candidates - correct, k) / math.comb(candidates, k)
    found = recall_by_chance(np.array([correct, correct]), candidates=candidates, k=k)
    assert found == pytest.approx(1 - missed)


def test_more_answers_than_candidates_are_all_shown():
    assert recall_by_chance(np.array([1]), candidates=3, k=10) == pytest.approx(1)


@pytest.fixture
def folder(tmp_path):
    """A training split, and a test split with two images of some concepts and an unknown one."""
    captions = {n: {"zh": [f"概念 {n}"], "en": [f"concept {n}"]} for n in range(9)}
    train = [make_sample(n, concept=str(n % 8), captions=captions[n % 8]) for n in range(20)]
    test = [make_sample(100 + n, concept=str(n % 9), captions=captions[n % 9]) for n in range(14)]
    write_split(tmp_path, train)
    return write_split(tmp_path, test, split="test_style")


def shrunk(image):
    """Shrink an image; return its values as a unit vector around their mean."""
    values = np.asarray(decode_image(image).resize((12, 12), Image.Resampling.BOX), np.float64)
    values = values - values.mean()
    return (values / np.linalg.norm(values)).ravel()


def plain_ranks(folder):
    """Rank by loops over all pairs of images, by direction."""
    references, test = list(open_split(folder)), list(open_split(folder, "test_style"))
    names = list(dict.fromkeys(each.concept for each in test))
    score = {}
    for name in names:
        own = [shrunk(each.image) for each in references if each.concept == name]
        for place, sample in enumerate(test):
            score[name, place] = max(
                (each @ shrunk(sample.image) for each in own), default=-math.inf
            )

    def rank(scores, right):
        best = max(scores[each] for each in right)
        return 1 + sum(scores[each] >= best for each in scores if each not in right)

    texts = [
        rank({place: score[name, place] for place in range(len(test))},
             {place for place, each in enumerate(test) if each.concept == name})
        for name in names
    ]  # fmt: skip
    images = [
        rank({name: score[name, place] for name in names}, {each.concept})
        for place, each in enumerate(test)
    ]
    return {"text_to_image": texts, "image_to_text": images}


def test_pixel_ranks_equal_a_plain_search(folder):
    pairs = pairs_of_split(of_split(folder, "test_style"), languages=["zh", "en"])
    found, expected = pixel_ranks(pairs, open_split(folder)), plain_ranks(folder)
    for language in ("zh", "en"):
        for direction, ranks in expected.items():
            assert found[language][direction].tolist() == ranks
            assert NOT_FOUND not in found[language][direction]


def test_the_image_itself_is_found_among_its_references(folder):
    pairs = pairs_of_split(of_split(folder, "train"), languages=["en"])
    ranks = pixel_ranks(pairs, open_split(folder))
    assert scores_of(ranks)["en/image_to_text/recall@1"] == 1


def test_a_run_has_chance_and_the_pixels_that_were_asked_for(embedder, folder):
    plain, asked = (
        evaluate(embedder, [RetrievalSource(path=str(folder), name="x", pixels=pixels)])
        for pixels in (None, "train")
    )
    assert plain.benchmarks["x"].baselines.keys() == {"chance"}
    found = asked.benchmarks["x"].baselines
    pairs = asked.benchmarks["x"].pairs
    assert found["pixels"] == scores_of(pixel_ranks(pairs, open_split(folder)))
    assert found["chance"] == chance_scores(pairs)
    assert found["chance"]["en/text_to_image/recall@1"] == pytest.approx(14 / 9 / 14)
    assert asked.as_record()["benchmarks"]["x"]["baselines"]["pixels"] == found["pixels"]
