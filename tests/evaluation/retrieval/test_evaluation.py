"""Scores equal a brute force over the whole similarity matrix, in both directions."""

import json

import numpy as np
import pytest
import torch

from tests.builders import make_sample, make_samples, of_split
from tests.support.processes import run_in_world
from vlm.distributed.groups import world_group
from vlm.embedding.bulk import BulkEmbedder
from vlm.embedding.embedder import Embedder
from vlm.errors import VlmError
from vlm.evaluation.retrieval.evaluation import (
    agreement_of,
    compare_pairs,
    evaluate_pairs,
    evaluate_retrieval,
)
from vlm.evaluation.retrieval.pairs import RetrievalPairs, Texts, pairs_of_split


class TableEmbedder(Embedder):
    """Looks vectors up instead of computing them."""

    device = torch.device("cpu")

    def __init__(self, table):
        self.table = table
        self.embed_dim = len(next(iter(table.values())))

    def encode_text(self, texts, **_):
        return self._rows(texts)

    def encode_image(self, images, **_):
        return self._rows(images)

    def _rows(self, names):
        return (
            np.array([self.table[name] for name in names])
            .reshape(-1, self.embed_dim)
            .astype(np.float32)
        )


def brute_force_recall(similarity, correct, k):
    """Share of the rows with a correct column that fewer than k wrong columns reach."""
    found, asked = 0, 0
    for row, answers in zip(similarity.tolist(), correct.tolist(), strict=True):
        if not any(answers):
            continue
        asked += 1
        best = max(score for score, right in zip(row, answers, strict=True) if right)
        found += k > sum(
            score >= best for score, right in zip(row, answers, strict=True) if not right
        )
    return found / asked


def make_case(seed, *, levels):
    """Return an embedder and pairs: several images a concept, some without a text.

    The vectors hold few levels, powers of two, so that many scores are exactly equal.
    """
    rng = np.random.default_rng(seed)
    images = [f"image {number}".encode() for number in range(40)]
    table = {image: rng.integers(-levels, levels + 1, 6) / 4 for image in images}
    texts = {}
    for language, concepts in (("zh", 15), ("en", 9)):
        names = [f"{language} {number}" for number in range(concepts)]
        table |= {name: rng.integers(-levels, levels + 1, 6) / 4 for name in names}
        concept_of = rng.integers(0, 18, len(images))  # concepts past the last have no text
        pairs = [(c, i) for i, c in enumerate(concept_of.tolist()) if c < concepts]
        pairs += [(c, 0) for c in range(concepts) if c not in concept_of]
        texts[language] = Texts(texts=names, matches=np.array(pairs))
    table = {name: vector.astype(np.float32) for name, vector in table.items()}
    return TableEmbedder(table), RetrievalPairs(images=images, texts=texts)


@pytest.mark.parametrize("levels", [1, 400], ids=["many ties", "few ties"])
@pytest.mark.parametrize("seed", range(8))
def test_recalls_equal_brute_force(seed, levels):
    embedder, pairs = make_case(seed, levels=levels)
    scores = evaluate_retrieval(embedder, pairs)
    images = embedder.encode_image(pairs.images)
    for language, of_language in pairs.texts.items():
        similarity = embedder.encode_text(of_language.texts) @ images.T
        correct = np.zeros(similarity.shape, bool)
        correct[tuple(of_language.matches.T)] = True
        expected = {
            f"{language}/{direction}/recall@{k}": brute_force_recall(table, answers, k)
            for direction, table, answers in (
                ("text_to_image", similarity, correct),
                ("image_to_text", similarity.T, correct.T),
            )
            for k in (1, 5, 10)
        }
        assert {key: scores[key] for key in expected} == pytest.approx(expected)
        assert scores[f"{language}/mean_recall"] == pytest.approx(np.mean(list(expected.values())))
    assert len(scores) == 14 + 8  # and medians and reciprocal means of both directions


def _scores_of_a_group(rank):
    embedder, pairs = make_case(3, levels=1)
    scores = evaluate_retrieval(embedder, pairs, group=world_group())
    return torch.tensor(list(scores.values()), dtype=torch.float64)


@pytest.mark.distributed
def test_every_rank_of_a_group_gets_the_scores_of_one_process():
    expected = _scores_of_a_group(0)
    for found in run_in_world(_scores_of_a_group, 3):
        assert found.tolist() == expected.tolist()


def test_cutoffs_are_those_asked_for():
    embedder, pairs = make_case(0, levels=400)
    scores = evaluate_retrieval(embedder, pairs, cutoffs=[2, 1000])
    assert {key.rsplit("@")[-1] for key in scores if "@" in key} == {"2", "1000"}
    assert scores["zh/text_to_image/recall@1000"] == 1
    assert scores["zh/image_to_text/recall@1000"] == 1


def test_a_perfect_model_finds_everything():
    table = {f"text {n}": np.eye(5, dtype=np.float32)[n] for n in range(5)}
    table |= {bytes([n]): np.eye(5, dtype=np.float32)[n] for n in range(5)}
    matches = np.stack([np.arange(5)] * 2, axis=1)
    texts = {"en": Texts(texts=[f"text {n}" for n in range(5)], matches=matches)}
    pairs = RetrievalPairs(images=[bytes([n]) for n in range(5)], texts=texts)
    assert set(evaluate_retrieval(TableEmbedder(table), pairs).values()) == {1.0}


def test_a_model_that_scores_all_alike_finds_nothing():
    same = np.array([1, 0], np.float32)
    images = [bytes([n]) for n in range(30)]
    names = [f"text {n}" for n in range(30)]
    embedder = TableEmbedder(dict.fromkeys([*images, *names], same))
    matches = np.stack([np.arange(30)] * 2, axis=1)
    pairs = RetrievalPairs(images=images, texts={"en": Texts(texts=names, matches=matches)})
    scores = evaluate_retrieval(embedder, pairs)
    assert {value for name, value in scores.items() if "recall" in name} == {0.0}
    assert scores["en/text_to_image/median_rank"] == 30
    assert scores["en/image_to_text/mrr"] == pytest.approx(1 / 30)


def test_a_real_model_is_scored_like_its_similarity_matrix(embedder, data_folder):
    pairs = pairs_of_split(of_split(data_folder, "test"), languages=["zh", "en"])
    scores = evaluate_retrieval(embedder, pairs)
    images = embedder.encode_image([sample.image for sample in make_samples(24)])
    for language in ("zh", "en"):
        texts = embedder.encode_text([make_sample(n).captions[language][0] for n in range(12)])
        correct = np.arange(12)[:, None] == np.arange(24)[None, :] % 12
        for k in (1, 5, 10):
            to_image = brute_force_recall(texts @ images.T, correct, k)
            to_text = brute_force_recall(images @ texts.T, correct.T, k)
            assert scores[f"{language}/text_to_image/recall@{k}"] == pytest.approx(to_image)
            assert scores[f"{language}/image_to_text/recall@{k}"] == pytest.approx(to_text)


@pytest.mark.parametrize("cutoffs", [[], [0], [1, -5]], ids=str)
def test_cutoffs_that_make_no_sense_are_refused(cutoffs):
    embedder, pairs = make_case(0, levels=1)
    with pytest.raises(VlmError, match=r"cutoffs are .*; expected numbers of at least 1"):
        evaluate_retrieval(embedder, pairs, cutoffs=cutoffs)


def test_an_evaluation_says_what_was_asked_and_how_it_was_read(embedder, data_folder):
    pairs = pairs_of_split(of_split(data_folder, "test"), languages=["zh", "en"])
    evaluation = evaluate_pairs(BulkEmbedder(embedder), pairs)
    assert evaluation.scores == evaluate_retrieval(embedder, pairs)
    assert evaluation.questions.keys() == {"zh", "en"}
    question = evaluation.questions["zh"]
    assert (question.images, question.captions) == (24, 12)
    assert question.captions_per_image == (1, 1.0, 1)
    record = json.loads(json.dumps(evaluation.as_record(), allow_nan=False))
    assert record["questions"]["zh"]["fingerprint"] == question.fingerprint
    assert record["reading"]["model"] == embedder.fingerprint
    assert record["reading"]["transform"] == embedder.bundle.preprocess_cfg
    assert record["reading"]["transform"]["size"] == 32


def test_an_evaluation_holds_intervals_cosines_and_agreement(embedder, data_folder):
    pairs = pairs_of_split(of_split(data_folder, "test"), languages=["zh", "en"])
    evaluation = evaluate_pairs(BulkEmbedder(embedder), pairs)
    record = evaluation.as_record()
    assert record["intervals"]["level"] == 0.95
    low, high = record["intervals"]["of"]["zh/mean_recall"]
    assert low <= record["scores"]["zh/mean_recall"] <= high
    images = embedder.encode_image(pairs.images)
    first = {}
    for language, of_language in pairs.texts.items():
        cosines = embedder.encode_text(of_language.texts) @ images.T
        right = np.zeros(cosines.shape, bool)
        right[tuple(of_language.matches.T)] = True
        assert record["cosines"][language]["correct"]["mean"] == pytest.approx(
            cosines[right].mean(), abs=1e-6
        )
        assert record["cosines"][language]["wrong"]["max"] == pytest.approx(
            cosines[~right].max(), abs=1e-6
        )
        first[language] = cosines.argmax(axis=1)
    # The data's texts of one number are each other's translations.
    assert record["agreement"]["en/zh"]["translations"] == 12
    assert record["agreement"]["en/zh"]["same_image"] == pytest.approx(
        np.mean(first["en"] == first["zh"])
    )


def test_a_model_that_understands_one_language_alone_does_not_agree_with_itself():
    images = np.eye(6, dtype=np.float32)
    table = {bytes([number]): images[number] for number in range(6)}
    table |= {f"en {number}": images[number] for number in range(6)}
    table |= {f"zh {number}": images[(number + (number < 5)) % 6] for number in range(6)}
    same = np.stack([np.arange(6)] * 2, axis=1)
    texts = {
        language: Texts(texts=[f"{language} {number}" for number in range(6)], matches=same)
        for language in ("zh", "en")
    }
    pairs = RetrievalPairs(
        images=[bytes([number]) for number in range(6)],
        texts=texts,
        translations={("en", "zh"): same},
    )
    bulk = BulkEmbedder(TableEmbedder(table))
    _, _, found = compare_pairs(bulk, pairs)
    agreement = agreement_of(found, pairs, cutoffs=[1, 6])
    assert agreement == {
        "en/zh": {"translations": 6, "same_image": 1 / 6, "both@1": 1 / 6, "both@6": 1.0}
    }
