"""A grown model says of English what it said before, here and in open_clip, and reads Chinese."""

import json
import math
import shutil
from dataclasses import replace
from functools import cache
from itertools import islice

import open_clip
import pytest
import torch
import torch.nn.functional as F

from tests.builders import IMAGE_SIZE, open_split, tiny_bundle, unique_captions
from tests.support.commands import ROOT
from vlm.bundle import load_bundle, save_bundle
from vlm.errors import ConfigError, TokenizerError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.models.build import build_encoder
from vlm.models.config import GrowthConfig
from vlm.text.pruning import prune
from vlm.text.tokenizer import Tokenizer, load_tokenizer
from vlm.vocabulary_transfer import grow_bundle, new_rows, prune_bundle

OLD = 49_408
# open_clip's own vision transformer and its default, `argmax`, for the end of text.
MODEL_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": OLD, "width": 64, "heads": 2, "layers": 2},
    "custom_text": True,
}
LONG = "a photograph of " + ", ".join(f"{i} dogs and a cat" for i in range(11))


@cache
def clip_zh():
    return load_tokenizer(ROOT / "tokenizers/clip-zh")


@pytest.fixture(scope="module")
def captions():
    samples = islice(open_split(ROOT / "data/emoji", "test_style"), 100)
    return unique_captions(samples, ["en"])[:300]


@pytest.fixture(scope="module")
def english(clip, tmp_path_factory):
    """Return the folder of an English CLIP of open_clip's kind with random weights."""
    torch.manual_seed(0)
    model = build_encoder(MODEL_CFG)
    torch.nn.init.normal_(model.text.positional_embedding, std=0.5)  # so that positions matter
    folder = tmp_path_factory.mktemp("english") / "bundle"
    save_bundle(
        folder,
        model=model,
        model_cfg=MODEL_CFG,
        preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
        tokenizer=clip,
        languages=("en",),
    )
    return folder


@pytest.fixture
def bundle(english):
    """Return the English CLIP, to be changed in place."""
    return load_bundle(english)


@pytest.fixture(scope="module")
def grown_folder(english, tmp_path_factory):
    """Return the folder of the English CLIP with Chinese ids, and a width it was trained at."""
    folder = tmp_path_factory.mktemp("grown") / "bundle"
    trained = replace(load_bundle(english), truncate_dims=(8,))
    grow_bundle(trained, clip_zh(), GrowthConfig(init="mean"), folder)
    return folder


@torch.inference_mode()
def features(bundle, texts):
    return bundle.model.encode_text(bundle.tokenizer.encode(texts))


@torch.inference_mode()
def open_clip_features(folder, tokenizer, texts):
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ids = tokenizer.encode(texts, pad_to=tokenizer.context_length).ids
    return model.eval().encode_text(ids, normalize=True)


@pytest.fixture(scope="module")
def english_features(english, captions):
    """Return the texts whose features are to stay, and these, here and in open_clip."""
    texts = [*captions, LONG]
    model = load_bundle(english)
    assert len(model.tokenizer.split([LONG])[0]) > 60
    return texts, features(model, texts), open_clip_features(english, model.tokenizer, texts)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["random", "mean", "lexicon"])
def test_every_english_feature_is_what_it_was(bundle, english_features, tmp_path, init):
    texts, before, original = english_features
    lexicon = tmp_path / "lexicon.tsv"
    lexicon.write_text("猫\tcat\n美国\tAmerica\n")
    config = GrowthConfig(init=init, positions=128, lexicon=lexicon)
    grow_bundle(bundle, clip_zh(), config, tmp_path / "grown")
    grown = load_bundle(tmp_path / "grown")
    assert grown.tokenizer.context_length == 128
    assert F.cosine_similarity(features(grown, texts), before).min() >= 0.999999
    again = open_clip_features(tmp_path / "grown", grown.tokenizer, texts)
    assert F.cosine_similarity(again, original).min() >= 0.999999


def test_open_clip_pools_a_grown_bundle_where_its_texts_end(grown_folder):
    grown = load_bundle(grown_folder)
    texts = ["一只猫", "a cat 在睡觉", "两个男人在街上走"]
    assert (grown.tokenizer.encode(texts).ids > OLD - 1).any(dim=1).all()
    theirs = open_clip_features(grown_folder, grown.tokenizer, texts)
    torch.testing.assert_close(features(grown, texts), theirs, rtol=0, atol=1e-5)
    config = json.loads((grown_folder / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["pool_type"] == "eos"
    assert config["model_cfg"]["text_cfg"]["eos_id"] == OLD - 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interpolate", "keep-head-stretch-tail"])
def test_stretched_positions_keep_the_length_and_what_they_promise(bundle, captions, tmp_path, how):
    split = zip(captions, bundle.tokenizer.split(captions), strict=True)
    short = [text for text, ids in split if len(ids) <= 18]
    before = features(bundle, short)
    config = GrowthConfig(init="mean", positions=248, how=how)
    grow_bundle(bundle, clip_zh(), config, tmp_path / "grown")
    grown = load_bundle(tmp_path / "grown")
    assert grown.model.text.positional_embedding.shape[0] == 248
    kept = F.cosine_similarity(features(grown, short), before).min() >= 0.999999
    assert kept == (how == "keep-head-stretch-tail")


def test_a_grown_bundle_says_where_its_new_ids_begin(bundle, grown_folder):
    assert load_bundle(grown_folder).first_new_id == OLD
    assert bundle.first_new_id is None


@pytest.mark.slow
def test_widths_that_features_were_trained_at_are_kept(
    bundle, grown_folder, clip, captions, tmp_path
):
    assert load_bundle(grown_folder).truncate_dims == (8,)
    smaller, kept = prune(clip, captions)
    prune_bundle(bundle, smaller, kept, tmp_path / "plain")
    assert load_bundle(tmp_path / "plain").truncate_dims == ()


def rows_by_piece(embedding, clip, **settings):
    grown = new_rows(embedding, clip, clip_zh(), GrowthConfig(**settings))
    pieces = clip_zh().vocabulary.pieces()[OLD:]
    return dict(zip(pieces, grown.rows, strict=True)), grown.known


@pytest.fixture(scope="module")
def embedding():
    return torch.randn(OLD, 16, generator=torch.Generator().manual_seed(1))


def mean_of(embedding, tokenizer, *texts):
    return embedding[[i for text in texts for i in tokenizer.split([text])[0]]].mean(dim=0)


def test_the_mean_is_that_of_the_pieces_a_new_one_was_split_into(embedding, clip):
    rows, known = rows_by_piece(embedding, clip, init="mean")
    assert known == len(rows) == 8000
    for piece in ("猫", "一个", "美国"):
        torch.testing.assert_close(rows[piece], mean_of(embedding, clip, piece))


def test_a_lexicon_gives_the_mean_of_its_translations_and_else_of_the_pieces(
    embedding, clip, tmp_path
):
    lexicon = tmp_path / "lexicon.tsv"
    lexicon.write_text("猫\tcat\n猫\tpuss in boots\n美国\tAmerica\n不存在的词\tnothing\n")
    rows, known = rows_by_piece(embedding, clip, init="lexicon", lexicon=lexicon)
    assert known == 2
    torch.testing.assert_close(rows["猫"], mean_of(embedding, clip, "cat", "puss in boots"))
    torch.testing.assert_close(rows["美国"], mean_of(embedding, clip, "america"))
    torch.testing.assert_close(rows["狗"], mean_of(embedding, clip, "狗"))


@pytest.mark.slow
def test_cc_cedict_translates_most_new_pieces(embedding, clip):
    rows, known = rows_by_piece(embedding, clip, init="lexicon")
    assert known / len(rows) > 0.9


@pytest.mark.slow
def test_similar_rows_are_averaged_by_the_users_vectors(embedding, clip, tmp_path):
    vectors = tmp_path / "both.vec"
    vectors.write_text("3 2\n猫 1 0\ncat 1 0\ndog 0 1\n")
    settings = {"init": "similarity", "vectors": (vectors,), "neighbours": 2, "temperature": 0.5}
    rows, known = rows_by_piece(embedding, clip, **settings)
    assert known == 1
    cat, dog = (embedding[clip.split([word])[0][0]] for word in ("cat", "dog"))
    weight = math.exp(2) / (math.exp(2) + 1)
    # CLIP has `cat` and `dog` at the end of a word and inside of one: two rows of one vector.
    assert known == 1
    assert torch.isfinite(rows["猫"]).all()
    inside = [clip.vocabulary.id_of(word) for word in ("cat", "dog")]
    if None in inside:
        torch.testing.assert_close(rows["猫"], weight * cat + (1 - weight) * dog)
    else:
        torch.testing.assert_close(rows["猫"], (cat + embedding[inside[0]]) / 2)
    torch.testing.assert_close(rows["狗"], mean_of(embedding, clip, "狗"))


def test_random_rows_follow_their_seed(embedding, clip):
    first, _ = rows_by_piece(embedding, clip, init="random", seed=3)
    same, _ = rows_by_piece(embedding, clip, init="random", seed=3)
    other, _ = rows_by_piece(embedding, clip, init="random", seed=4)
    assert first["猫"].equal(same["猫"])
    assert not first["猫"].equal(other["猫"])


def test_similarity_without_vectors_asks_for_them(embedding, clip):
    with pytest.raises(ConfigError, match="name files of word vectors with --vectors"):
        rows_by_piece(embedding, clip, init="similarity")


@pytest.mark.slow
def test_vectors_of_one_language_alone_are_refused(embedding, clip, tmp_path):
    vectors = tmp_path / "zh.vec"
    vectors.write_text("猫 1 0\n狗 0 1\n")
    with pytest.raises(TokenizerError, match="2 of 8000 new pieces and 0 of the old"):
        rows_by_piece(embedding, clip, init="similarity", vectors=(vectors,))


def test_a_tokenizer_that_is_no_extension_of_the_bundles_is_refused(tmp_path):
    folder = tiny_bundle(tmp_path / "bundle")
    with pytest.raises(TokenizerError, match=r"57408 ids do not go on from the 320"):
        grow_bundle(load_bundle(folder), clip_zh(), GrowthConfig(), tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_an_extension_that_cleans_otherwise_is_refused(bundle, tmp_path):
    other = Tokenizer(clip_zh().vocabulary, replace(clip_zh().config, cleaning="none"))
    with pytest.raises(TokenizerError, match="expected one that was extended from the bundle's"):
        grow_bundle(bundle, other, GrowthConfig(init="mean"), tmp_path / "grown")


def test_fewer_positions_than_before_are_refused(bundle, tmp_path):
    config = GrowthConfig(init="mean", positions=64)
    with pytest.raises(ConfigError, match="64 positions is shorter than the 77"):
        grow_bundle(bundle, clip_zh(), config, tmp_path / "grown")


def test_a_pruned_bundle_gives_the_same_features_for_the_texts_it_was_pruned_by(
    bundle, captions, tmp_path
):
    before = features(bundle, captions)
    smaller, kept = prune(bundle.tokenizer, captions)
    assert len(kept) < OLD // 10
    prune_bundle(bundle, smaller, kept, tmp_path / "pruned")
    pruned = load_bundle(tmp_path / "pruned")
    assert pruned.model.text.token_embedding.weight.shape[0] == smaller.vocab_size == len(kept)
    torch.testing.assert_close(features(pruned, captions), before, rtol=0, atol=1e-6)
    theirs = open_clip_features(tmp_path / "pruned", pruned.tokenizer, captions)
    torch.testing.assert_close(theirs, before, rtol=0, atol=1e-5)


def test_a_bundle_with_another_tokenizer_in_it_is_refused(english, tmp_path):
    folder = shutil.copytree(english, tmp_path / "bundle")
    clip_zh().save(folder / "tokenizer")
    with pytest.raises(TokenizerError, match=r"holds another tokenizer \(.{12}\) than its model"):
        load_bundle(folder)
