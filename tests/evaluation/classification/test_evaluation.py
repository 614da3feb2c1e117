"""The vector of a class is the mean of its prompts', and scores follow from it in each language."""

import numpy as np
import pytest
import torch

from tests.builders import THINGS, encoded, make_image, tiny_bundle
from vlm.embedding.bulk import BulkEmbedder
from vlm.embedding.embedder import Embedder
from vlm.errors import VlmError
from vlm.evaluation.classification import run
from vlm.evaluation.classification.run import classifier_weights, evaluate_classification

TEMPLATES = ("{}", "a photo of a {}", "{} drawn by hand")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return Embedder.load(
        tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle", context_length=32), device="cpu"
    )


def naive_weight(embedder, names, templates):
    total = np.zeros(embedder.embed_dim)
    for name in names:
        for template in templates:
            vector = embedder.encode_text([template.replace("{}", name)])[0].astype(np.float64)
            total += vector / np.linalg.norm(vector)
    return total / np.linalg.norm(total)


@pytest.mark.parametrize("prompts_at_a_time", [1, 7, 10_000])
def test_a_classs_vector_is_the_direction_of_its_prompts_mean(
    embedder, monkeypatch, prompts_at_a_time
):
    monkeypatch.setattr(run, "_PROMPTS_AT_A_TIME", prompts_at_a_time)
    names = ["red apple", ["grey cat", "kitten"], ("dog",), "red apple"]
    weights = classifier_weights(BulkEmbedder(embedder), names, TEMPLATES)
    assert weights.dtype == np.float32
    assert weights.shape == (4, 32)
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, atol=1e-6)
    for weight, of_class in zip(weights, names, strict=True):
        synonyms = [of_class] if isinstance(of_class, str) else of_class
        np.testing.assert_allclose(weight, naive_weight(embedder, synonyms, TEMPLATES), atol=1e-5)


@pytest.mark.slow
def test_class_vectors_are_clip_benchmarks(embedder):
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    class Model(torch.nn.Module):
        def encode_text(self, numbers):
            return torch.from_numpy(embedder.encode_text([texts[n] for n in numbers]))

    texts = []

    def tokenizer(prompts):
        texts.extend(prompts)
        return torch.arange(len(texts) - len(prompts), len(texts))

    names = [en for en, _ in THINGS]
    templates = [template.replace("{}", "{c}") for template in TEMPLATES]
    theirs = zero_shot_classifier(Model(), tokenizer, names, templates, "cpu", amp=False)
    ours = classifier_weights(BulkEmbedder(embedder), names, templates)
    np.testing.assert_allclose(ours, theirs.T.numpy(), atol=1e-6)


def test_scores_by_language_are_those_of_the_vectors(embedder):
    pictures = [encoded(make_image(number)) for number in range(30)]
    labels = np.arange(30) % 12
    names = {"zh": [zh for _, zh in THINGS], "en": [en for en, _ in THINGS]}
    templates = {"zh": ["{}", "{}的图片"], "en": ["{}"]}
    scores = evaluate_classification(BulkEmbedder(embedder), pictures, labels, names, templates)
    images = embedder.encode_image(pictures)
    assert list(scores) == ["zh", "en"]
    for language, found in scores.items():
        weights = np.stack(
            [naive_weight(embedder, [n], templates[language]) for n in names[language]]
        )
        cosines = images @ weights.T
        assert found.top1 == pytest.approx((cosines.argmax(axis=1) == labels).mean())
        best = np.argsort(-cosines, axis=1)[:, :5]
        assert found.top5 == pytest.approx((best == labels[:, None]).any(axis=1).mean())
        assert found.confusion[:, 2].sum() == 30


@pytest.mark.parametrize(
    ("names", "templates"), [([], ["{}"]), (["cat"], []), (["cat", []], ["{}"])], ids=str
)
def test_classes_without_prompts_are_refused(embedder, names, templates):
    with pytest.raises(VlmError, match=r"expected at least one of each, and a name for each class"):
        classifier_weights(BulkEmbedder(embedder), names, templates)


IMAGE = encoded(make_image(0))


@pytest.mark.parametrize(
    ("images", "labels", "templates", "said"),
    [
        ([], [], {"en": ["{}"]}, "found 0 images and 0 labels"),
        ([IMAGE], [0, 1], {"en": ["{}"]}, "found 1 images and 2 labels; expected the same number"),
        (
            [IMAGE],
            [2],
            {"en": ["{}"]},
            r"labels are in \[2, 2\]; expected \[0, 1\] for the 2 classes",
        ),
        ([IMAGE], [-1], {"en": ["{}"]}, r"labels are in \[-1, -1\]"),
        ([IMAGE], [0], {"zh": ["{}"]}, "class names in 'en', but templates only in zh"),
    ],
    ids=["nothing", "unequal", "too large", "negative", "language"],
)
def test_inputs_that_do_not_fit_together_are_refused(embedder, images, labels, templates, said):
    with pytest.raises(VlmError, match=said):
        evaluate_classification(
            BulkEmbedder(embedder),
            images,
            np.array(labels, dtype=np.int64),
            {"en": ["cat", "dog"]},
            templates,
        )
