"""Scores on the shipped emoji are those of Chinese-CLIP's and CLIP_benchmark's own code.

A tiny model that has learnt a little gives the features. Images have up to 17 captions, captions
belong to up to 34 images, some images are there twice and some have no caption. Where a
peer's score depends on the order of equal scores, a test of its own names the rule of either.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from tests.builders import IMAGE_SIZE, of_split, open_split, tiny_model
from tests.support.commands import ROOT
from tests.support.peers import chinese_clip_scores
from vlm.bundle import Bundle
from vlm.embedding.bulk import BulkEmbedder
from vlm.embedding.embedder import Embedder
from vlm.evaluation.classification.dataset import images_of_source
from vlm.evaluation.classification.prompts import read_class_names
from vlm.evaluation.classification.run import classifier_weights, evaluate_classification
from vlm.evaluation.retrieval.comparison import compare
from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
from vlm.evaluation.retrieval.metrics import recall_at
from vlm.evaluation.retrieval.pairs import RetrievalPairs, Texts, correct_pairs
from vlm.images.config import PreprocessConfig
from vlm.images.decoding import decode_image
from vlm.images.transforms import evaluation_transform, preprocess_cfg
from vlm.models.encoder import Encoder
from vlm.text.tokenizer import TokenBatch, load_tokenizer

DATA = ROOT / "data" / "emoji"
CUTOFFS = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")
TEMPLATES = {
    "en": ["{c}", "emoji: {c}", "this is {c}", "{c} on white"],
    "zh": ["{c}", "{c}的表情符号", "一张{c}的图片"],
}

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings(
        # Of scikit-learn, in CLIP_benchmark: its mean leaves out classes without images, as ours.
        "ignore:y_pred contains classes not in y_true:UserWarning"
    ),
]


@dataclass(frozen=True)
class Emoji:
    """An image and all its captions by language."""

    image: bytes
    captions: dict[str, list[str]]


@dataclass(frozen=True)
class InDoubles:
    """Encodes in float64, and rounds features to float32.

    Two scores may be so near that rounding decides, which depends on a feature's batch and on who
    adds up.
    """

    model: Encoder
    scored_in: torch.dtype = torch.float32

    @property
    def embed_dim(self):
        return self.model.embed_dim

    @property
    def device(self):
        return self.model.device

    def encode_image(self, images):
        return self.model.encode_image(images.double()).to(self.scored_in)

    def encode_text(self, tokens):
        return self.model.encode_text(tokens).to(self.scored_in)


@pytest.fixture(scope="module")
def emoji():
    """The 365 images of the validation split: 332 things, some in several styles."""
    return [Emoji(sample.image, dict(sample.captions)) for sample in open_split(DATA, "val")]


@pytest.fixture(scope="module")
def silent():
    """20 images of other things, whose captions nobody is told."""
    split = open_split(DATA, "test_novel_style")
    return [Emoji(split[number].image, {}) for number in range(20)]


@pytest.fixture(scope="module")
def embedder(emoji):
    """A tiny model after a few steps on these images, so that scores are far from 0 and 1."""
    tokenizer = load_tokenizer(ROOT / "tokenizers" / "emoji-zh-en")
    cfg = preprocess_cfg(PreprocessConfig(), IMAGE_SIZE)
    transform = evaluation_transform(cfg)
    model = tiny_model(tokenizer).train()
    pixels = torch.stack([transform(decode_image(each.image)) for each in emoji])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for step in range(60):
        rows = rng.permutation(len(emoji))[:128]
        images = model.encode_image(pixels[rows])
        loss = torch.zeros(())
        for language in ("zh", "en"):
            several = [emoji[row].captions[language] for row in rows]
            texts = tokenizer.encode([captions[step % len(captions)] for captions in several])
            logits = 20 * model.encode_text(texts) @ images.T
            right = torch.arange(len(rows))
            loss = loss + F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bundle = Bundle(
        model=model.eval().double(), tokenizer=tokenizer, transform=transform,
        model_cfg={}, preprocess_cfg=cfg,
    )  # fmt: skip
    return Embedder(bundle, model=InDoubles(model))


def captions_of(emoji, language):
    """Return all captions, those of an image after each other, and the image of each."""
    owned = [(text, n) for n, each in enumerate(emoji) for text in each.captions.get(language, [])]
    texts, owners = zip(*owned, strict=True)
    return list(texts), np.array(owners)


def our_scores(embedder, emoji, language, policy):
    """Return R@1, R@5 and R@10 by direction."""
    texts, owners = captions_of(emoji, language)
    owned = np.stack([np.arange(len(texts)), owners], axis=1)
    asked = Texts(texts=texts, matches=correct_pairs(texts, owned, policy))
    pairs = RetrievalPairs(images=[each.image for each in emoji], texts={language: asked})
    scores = evaluate_retrieval(embedder, pairs, cutoffs=CUTOFFS)
    return {
        direction: [scores[f"{language}/{direction}/recall@{k}"] for k in CUTOFFS]
        for direction in DIRECTIONS
    }


def assert_like_chinese_clip(ours, theirs):
    recalls = [100 * recall for recall in ours]
    assert 1 < recalls[0] < recalls[2] < 99
    assert theirs == pytest.approx([sum(recalls) / 3, *recalls], abs=1e-6)


def features_of(embedder, emoji, texts):
    images = embedder.encode_image([each.image for each in emoji])
    return {"text": embedder.encode_text(texts), "image": images}


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_scores_are_chinese_clips_where_a_caption_is_right_for_all_images_that_have_it(
    tmp_path, embedder, emoji, silent, language, direction
):
    asked = [*emoji, *silent, *emoji[:40]]  # forty images are there twice
    texts, owners = captions_of(asked, language)
    right = {text: [] for text in texts}
    for text, owner in zip(texts, owners.tolist(), strict=True):
        right[text].append(owner)
    assert len(right) < len(texts) - 400
    theirs = chinese_clip_scores(
        tmp_path,
        features_of(embedder, asked, texts),
        {number: right[text] for number, text in enumerate(texts)},
        direction,
    )
    ours = our_scores(embedder, asked, language, "by string")
    assert_like_chinese_clip(ours[direction], theirs)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_scores_are_chinese_clips_where_a_caption_is_right_for_its_own_image_only(
    tmp_path, embedder, emoji, silent, language
):
    asked = [*silent, *emoji]
    texts, owners = captions_of(asked, language)
    theirs = chinese_clip_scores(
        tmp_path,
        features_of(embedder, asked, texts),
        {number: [owner] for number, owner in enumerate(owners.tolist())},
        "text_to_image",
    )
    ours = our_scores(embedder, asked, language, "by id")
    assert_like_chinese_clip(ours["text_to_image"], theirs)


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_wrong_answer_with_an_equal_score_is_first_here_and_in_its_place_in_chinese_clips_file(
    tmp_path, embedder, emoji, direction
):
    asked = with_own_captions(emoji, "en")
    texts, owners = captions_of(asked, "en")
    # Sums of products of such numbers are exact in float32, in whatever order they are added.
    features = {
        kind: (rows * 4096).round() / 4096
        for kind, rows in features_of(embedder, asked, texts).items()
    }
    matches = np.stack([np.arange(len(texts)), owners], axis=1)
    answer = "image" if direction == "text_to_image" else "text"
    alone = getattr(compare(features["text"], features["image"], matches), direction)
    features[answer] = np.tile(features[answer], (2, 1))  # the second of each is never right
    ranks = getattr(compare(features["text"], features["image"], matches), direction)
    right = {number: [owner] for number, owner in enumerate(owners.tolist())}
    theirs = []
    for last_first in (False, True):
        folder = tmp_path / str(last_first)
        folder.mkdir()
        theirs.append(
            chinese_clip_scores(folder, features, right, direction, last_first=last_first)
        )
    ours = [100 * recall_at(ranks, k) for k in CUTOFFS]
    assert ours[0] == 0 < ours[1] < ours[2]
    assert theirs[True][1:] == pytest.approx(ours, abs=1e-6)
    assert theirs[False][1] == pytest.approx(100 * recall_at(alone, 1), abs=1e-6)
    assert theirs[False][1] > 1


class TokensOnCpu(TokenBatch):
    """Takes CLIP_benchmark's name of a device, and stays where it is."""

    def to(self, device):
        return self


def tokenizer_of(embedder):
    def tokenize(texts):
        batch = embedder.tokenizer.encode(texts)
        return TokensOnCpu(batch.ids, batch.mask)

    return tokenize


def clip_benchmark_scores(embedder, emoji, language):
    """Return R@1, R@5 and R@10 by direction, with the model's own forward passes."""
    from clip_benchmark.metrics import zeroshot_retrieval

    def collate(rows):
        return torch.stack([image for image, _ in rows]), [captions for _, captions in rows]

    rows = [
        (embedder.bundle.transform(decode_image(each.image)), each.captions.get(language, []))
        for each in emoji
    ]
    scores = zeroshot_retrieval.evaluate(
        replace(embedder.model, scored_in=torch.float64),
        DataLoader(rows, batch_size=64, collate_fn=collate),
        tokenizer_of(embedder),
        "cpu",
        amp=False,
        recall_k_list=list(CUTOFFS),
    )
    return {
        direction: [scores[f"{found}_retrieval_recall@{k}"] for k in CUTOFFS]
        for direction, found in zip(DIRECTIONS, ("image", "text"), strict=True)
    }


def with_own_captions(emoji, language):
    """Leave each caption to the first image that has it, and say each image's first twice."""
    seen, asked = set(), []
    for each in emoji:
        own = [text for text in each.captions[language] if text not in seen]
        seen.update(own)
        if own:
            asked.append(Emoji(each.image, {language: [*own, own[0]]}))
    return asked


@pytest.mark.parametrize("language", ["zh", "en"])
def test_scores_are_clip_benchmarks_where_no_images_share_a_caption(embedder, emoji, language):
    asked = with_own_captions(emoji, language)
    assert len(asked) > 300
    ours = our_scores(embedder, asked, language, "by id")
    theirs = clip_benchmark_scores(embedder, asked, language)
    for direction in DIRECTIONS:
        assert 0.01 < ours[direction][0] < ours[direction][2] < 0.99
        assert ours[direction] == pytest.approx(theirs[direction], abs=1e-6)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_of_equal_captions_the_wrong_is_first_here_and_either_in_clip_benchmark(
    embedder, emoji, language
):
    theirs = clip_benchmark_scores(embedder, emoji, language)
    ours = our_scores(embedder, emoji, language, "by id")
    assert ours["text_to_image"] == pytest.approx(theirs["text_to_image"], abs=1e-6)
    # The fewest and the most that an order of equal scores can give: here the equal caption of
    # another image is right as well.
    most = our_scores(embedder, emoji, language, "by string")["image_to_text"]
    bounds = zip(ours["image_to_text"], theirs["image_to_text"], most, strict=True)
    for low, found, high in bounds:
        assert low < high
        assert low - 1e-6 <= found <= high + 1e-6


def test_an_image_without_a_caption_is_no_question_here_and_an_unanswered_one_in_clip_benchmark(
    embedder, emoji, silent
):
    told = with_own_captions(emoji, "zh")
    asked = [*silent, *told]
    theirs = clip_benchmark_scores(embedder, asked, "zh")
    ours = our_scores(embedder, asked, "zh", "by id")
    assert ours["text_to_image"] == pytest.approx(theirs["text_to_image"], abs=1e-6)
    answered = [recall * len(told) / len(asked) for recall in ours["image_to_text"]]
    assert answered == pytest.approx(theirs["image_to_text"], abs=1e-6)
    assert answered[0] > 0.01


@pytest.fixture
def classification(monkeypatch):
    """CLIP_benchmark's module, which takes an array of one number for a number, as numpy did."""
    from clip_benchmark.metrics import zeroshot_classification

    def number(one):
        return one.item() if isinstance(one, np.ndarray) else float(one)

    monkeypatch.setattr(zeroshot_classification, "float", number, raising=False)
    return zeroshot_classification


def classified_by_clip_benchmark(classification, embedder, images, names, templates):
    class Images(list):
        classes = names

    rows = Images(
        (embedder.bundle.transform(decode_image(image)), label)
        for image, label in zip(images.images, images.labels.tolist(), strict=True)
    )
    loader = DataLoader(rows, batch_size=64)
    return classification.evaluate(
        embedder.model, loader, tokenizer_of(embedder), names, templates, "cpu", amp=False
    )


def emoji_classes(label):
    names = read_class_names([str(DATA / "classes.json")], ["zh", "en"], label=label)
    return images_of_source(of_split(DATA, "val"), label=label, class_ids=names.ids), {
        language: [name for (name,) in of_language] for language, of_language in names.names.items()
    }


@pytest.mark.parametrize(
    ("label", "classes"), [pytest.param("class", 59, marks=pytest.mark.slow), ("group", 9)]
)
def test_classification_is_clip_benchmarks(classification, embedder, label, classes):
    images, names = emoji_classes(label)
    ours = evaluate_classification(
        BulkEmbedder(embedder), images.images, images.labels, names, TEMPLATES
    )
    assert ours.keys() == {"zh", "en"}
    for language, found in ours.items():
        asked = names[language], TEMPLATES[language]
        assert len(asked[0]) == classes
        theirs = classified_by_clip_benchmark(classification, embedder, images, *asked)
        assert 1 / classes < found.top1 < found.top5 < 1
        assert found.top1 == pytest.approx(theirs["acc1"], abs=1e-6)
        assert found.top5 == pytest.approx(theirs["acc5"], abs=1e-6)
        assert found.mean_class_recall == pytest.approx(theirs["mean_per_class_recall"], abs=1e-6)
        weights = classification.zero_shot_classifier(
            embedder.model, tokenizer_of(embedder), *asked, "cpu", amp=False
        )
        np.testing.assert_allclose(
            classifier_weights(BulkEmbedder(embedder), *asked), weights.T, atol=1e-6
        )


def test_a_class_called_as_the_right_one_comes_before_it_here_and_may_not_in_clip_benchmark(
    classification, embedder
):
    images, names = emoji_classes("group")
    twice = [*names["en"], *names["en"]]
    ours = evaluate_classification(
        BulkEmbedder(embedder), images.images, images.labels, {"en": twice}, TEMPLATES
    )["en"]
    theirs = classified_by_clip_benchmark(classification, embedder, images, twice, TEMPLATES["en"])
    assert ours.top1 == 0 < theirs["mean_per_class_recall"]
