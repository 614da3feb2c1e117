"""A source is known by what it holds; an English CLIP is taught Chinese on the way."""

import json
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, CLIPModel

from tests.builders import open_split, tiny_bundle, unique_captions
from tests.checkpoints.sources import disturb, pixels
from tests.support.commands import ROOT
from vlm.bundle import load_bundle
from vlm.checkpoints.config import ConversionConfig, Extension
from vlm.checkpoints.conversion import convert
from vlm.errors import CheckpointError
from vlm.models.build import build_encoder
from vlm.models.config import GrowthConfig
from vlm.text.pruning import prune

CLIP_ZH = ROOT / "tokenizers/clip-zh"
OLD = 49_408
LONG = "a photograph of " + ", ".join(f"{number} dogs and a cat" for number in range(11))
# open_clip's own description of a small CLIP, in a folder as open_clip writes it.
MODEL_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": OLD, "width": 64, "heads": 2, "layers": 2},
}


EXTENSION = Extension(tokenizer=CLIP_ZH, growth=GrowthConfig(init="mean", positions=128))


@pytest.fixture(scope="module")
def captions():
    samples = islice(open_split(ROOT / "data/emoji", "test_style"), 100)
    return unique_captions(samples, ["en"])[:300]


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """An English CLIP as a folder of open_clip, with its text tower at the top as of old."""
    torch.manual_seed(0)
    model = disturb(build_encoder(MODEL_CFG | {"custom_text": True}))
    for rows in (model.text.positional_embedding, model.text.token_embedding.weight):
        torch.nn.init.normal_(rows, std=0.5)  # so that both matter
    folder = tmp_path_factory.mktemp("english")
    record = {"model_cfg": MODEL_CFG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    named = {
        name.removeprefix("text.").replace("log_logit", "logit"): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save({"state_dict": named}, folder / "open_clip_pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def converted(english, tmp_path_factory):
    """Return the model's bundle as it is, and extended on the way from its source."""
    plain, grown = (tmp_path_factory.mktemp("bundles") / name for name in ("plain", "grown"))
    convert(english, plain, ConversionConfig())
    convert(english, grown, ConversionConfig(), extension=EXTENSION)
    return plain, grown


@pytest.mark.slow
@torch.inference_mode()
def test_an_extended_model_says_of_english_what_it_said_before(converted, captions):
    old, new = map(load_bundle, converted)
    texts = [*captions, LONG]
    before, after = (each.model.encode_text(each.tokenizer.encode(texts)) for each in (old, new))
    assert len(texts) > 100
    assert F.cosine_similarity(before, after).min() >= 0.999999
    assert new.model.encode_image(pixels(new)).equal(old.model.encode_image(pixels(old)))
    assert new.tokenizer.context_length == 128
    assert new.tokenizer.vocab_size == 57_408
    assert new.first_new_id == OLD
    chinese = new.tokenizer.encode(["一只猫在睡觉", "两只狗在睡觉"])
    assert (chinese.ids >= OLD).any(dim=1).all()
    one, other = new.model.encode_text(chinese)
    assert F.cosine_similarity(one, other, dim=0) < 0.9999
    assert not list(converted[1].parent.glob(".*"))  # nothing is left of the way


@pytest.mark.slow
def test_extending_a_bundle_is_the_same_as_extending_its_source(converted, tmp_path):
    plain, grown = converted
    convert(plain, tmp_path / "two", ConversionConfig(), extension=EXTENSION)
    assert load_bundle(grown).fingerprint == load_bundle(tmp_path / "two").fingerprint


@pytest.mark.slow
@torch.inference_mode()
def test_an_extended_model_goes_to_transformers_in_the_same_command(
    english, converted, captions, tmp_path
):
    said = convert(english, tmp_path / "hf", ConversionConfig(), extension=EXTENSION, target="hf")
    assert "mends no broken encodings" in said[-1]
    grown = load_bundle(converted[1])
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "hf") for kind in (CLIPModel, AutoTokenizer)
    )
    texts = ["a cat", "一只猫 sleeps", *captions[:20]]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    tokens = grown.tokenizer.encode(texts)
    assert inputs["input_ids"].equal(tokens.ids)
    theirs = model.eval().get_text_features(
        input_ids=inputs["input_ids"], attention_mask=tokens.mask.long()
    )
    theirs = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    ours = grown.model.encode_text(tokens)
    torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), rtol=0, atol=1e-5)


def test_a_model_with_more_rows_than_its_tokenizer_has_ids_is_not_extended(
    english, clip, captions, tmp_path
):
    smaller, _ = prune(clip, captions)
    smaller.save(tmp_path / "tokenizer")
    config = ConversionConfig(tokenizer=str(tmp_path / "tokenizer"))
    extension = Extension(tokenizer=CLIP_ZH, growth=GrowthConfig(init="mean"))
    with pytest.raises(CheckpointError, match=rf"has {OLD} rows and its tokenizer \d+ ids"):
        convert(english, tmp_path / "grown", config, extension=extension)
    assert not (tmp_path / "grown").exists()


def test_an_unknown_file_is_named_with_some_of_its_tensors(tmp_path):
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "openclip-vit-chinese.pt")
    with pytest.raises(CheckpointError, match=r"an unknown model \(encoder\.weight, \.\.\.\)"):
        convert(tmp_path / "openclip-vit-chinese.pt", tmp_path / "bundle", ConversionConfig())


@pytest.mark.parametrize("name", ["clip-vit-base", "chinese-clip"])
def test_an_unknown_folder_is_named_whatever_it_is_called(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is an unknown kind of folder"):
        convert(tmp_path / name, tmp_path / "bundle", ConversionConfig())


def test_a_bundle_leaves_nothing_open_and_needs_no_conversion(tmp_path):
    folder = tiny_bundle(tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="is already a bundle; expected --extend or --format"):
        convert(folder, tmp_path / "out", ConversionConfig())
    with pytest.raises(
        CheckpointError, match="is already a bundle; options on the source do not apply"
    ):
        convert(folder, tmp_path / "out", ConversionConfig(model="ViT-B-32"), target="hf")


def test_a_source_cannot_be_its_own_result(english):
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(english, english, ConversionConfig())
    assert (english / "open_clip_pytorch_model.bin").is_file()


def test_a_result_under_a_file_is_refused(english, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*: File exists"):
        convert(english, tmp_path / "file" / "bundle", ConversionConfig())


def test_an_option_that_a_kind_has_not_is_refused(english, tmp_path):
    config = ConversionConfig(model="ViT-B-32", image_size=48)
    with pytest.raises(CheckpointError, match="does not take --model or --image_size"):
        convert(english, tmp_path / "bundle", config)
