"""Folders of transformers say as bundles what transformers makes of them."""

import json
import shutil
from pathlib import Path

import cn_clip.clip
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
)

from tests.checkpoints.sources import TAIYI, TEXTS, close, disturb, pixels, write_clip_vocabulary
from vlm.bundle import load_bundle
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.conversion import convert
from vlm.checkpoints.export import export
from vlm.errors import CheckpointError
from vlm.files import sha256_of
from vlm.images.config import PreprocessConfig

pytestmark = pytest.mark.peer

VOCABULARY = Path(cn_clip.clip.__file__).with_name("vocab.txt")
END = 49_407
TOWER = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
VISION = TOWER | {"image_size": 32, "patch_size": 8}


def write_clip(folder, *, text=None, vision=None, added=None):
    text_config = TOWER | {"bos_token_id": END - 1, "eos_token_id": END} | (text or {})
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text_config, vision_config=VISION | (vision or {}), projection_dim=40
    )
    model = disturb(CLIPModel(config))
    model.save_pretrained(folder)
    size = VISION["image_size"]
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(folder)
    write_clip_vocabulary(folder, added=added)
    return model


def write_chinese_clip(folder, **vision):
    config = ChineseCLIPConfig(
        text_config=TOWER | {"vocab_size": 21_128, "layer_norm_eps": 1e-12},
        vision_config=VISION | vision,
        projection_dim=40,
    )
    torch.manual_seed(0)
    model = disturb(ChineseCLIPModel(config))
    model.save_pretrained(folder)
    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    ChineseCLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder)
    shutil.copy(VOCABULARY, folder / "vocab.txt")
    return model


def changed(path, **changes):
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({n: v for n, v in record.items() if v is not None}))


def features(output):
    """Return features, which releases of transformers wrap differently."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@torch.inference_mode()
def agree(model, bundle, theirs, texts=TEXTS):
    """Compare ids, and the features of texts and images."""
    tokens = bundle.tokenizer.encode(texts)
    rows = [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
    assert rows == [theirs(text, truncation=True, max_length=tokens.ids.shape[1])["input_ids"]
                    for text in texts]  # fmt: skip
    inputs = {"input_ids": tokens.ids, "attention_mask": tokens.mask.long()}
    close(bundle.model.encode_text(tokens), features(model.get_text_features(**inputs)))
    images = pixels(bundle)
    close(bundle.model.encode_image(images), features(model.get_image_features(images)))
    torch.testing.assert_close(bundle.model.logit_scale, model.logit_scale.exp())


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_clip_gives_equal_ids_and_features(tmp_path, act, eps):
    same = {"hidden_act": act, "layer_norm_eps": eps}
    model = write_clip(tmp_path / "hf", text=same, vision=same)
    convert(tmp_path / "hf", tmp_path / "bundle", ConversionConfig())
    bundle = load_bundle(tmp_path / "bundle")
    agree(model, bundle, CLIPTokenizer.from_pretrained(tmp_path / "hf"))
    assert bundle.languages == ("en",)
    assert bundle.tokenizer.context_length == 77


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_chinese_clip_gives_equal_ids_and_features(tmp_path, act):
    model = write_chinese_clip(tmp_path / "hf", hidden_act=act)
    convert(tmp_path / "hf", tmp_path / "bundle", ConversionConfig())
    bundle = load_bundle(tmp_path / "bundle")
    agree(model, bundle, BertTokenizer.from_pretrained(tmp_path / "hf"))
    assert bundle.languages == ("zh",)
    assert bundle.tokenizer.context_length == 52
    assert bundle.preprocess_cfg["resize_mode"] == "squash"


@pytest.mark.slow
def test_taiyis_clip_is_pooled_where_a_text_ends(tmp_path):
    sizes = {"vocab_size": 57_475, "max_position_embeddings": 512, "num_hidden_layers": 1}
    model = write_clip(tmp_path / "hf", text=sizes, added=TAIYI)
    convert(tmp_path / "hf", tmp_path / "bundle", ConversionConfig())
    bundle = load_bundle(tmp_path / "bundle")
    long = "一个人在街上走，" * 60
    texts = [*TEXTS, "丁七万丈三上下", "a 世界 map", long]
    assert bundle.tokenizer.vocab_size == 57_475
    assert bundle.tokenizer.encode(texts).ids.max() > END
    assert bundle.tokenizer.encode([long]).ids.shape[1] > 300
    agree(model, bundle, CLIPTokenizer.from_pretrained(tmp_path / "hf"), texts)
    assert bundle.languages == ("zh", "en")
    # Before transformers pooled by the id, configurations said 2 and meant the highest id.
    text_config = json.loads((tmp_path / "hf/config.json").read_text())["text_config"]
    changed(tmp_path / "hf/config.json", text_config=text_config | {"eos_token_id": 2})
    convert(tmp_path / "hf", tmp_path / "old", ConversionConfig())
    assert load_bundle(tmp_path / "old").model_cfg == bundle.model_cfg


@pytest.mark.slow
def test_what_a_configuration_leaves_out_is_the_default_of_transformers(tmp_path):
    vision = {"num_hidden_layers": 1, "hidden_size": 768, "intermediate_size": 3072,
              "num_attention_heads": 12, "patch_size": 32}  # fmt: skip
    model = write_clip(tmp_path / "hf", vision=vision)
    changed(
        tmp_path / "hf/config.json",
        vision_config={"num_hidden_layers": 1, "image_size": 32},
        text_config=TOWER,
    )
    convert(tmp_path / "hf", tmp_path / "bundle", ConversionConfig())
    agree(model, load_bundle(tmp_path / "bundle"), CLIPTokenizer.from_pretrained(tmp_path / "hf"))


@pytest.mark.parametrize("kind", ["shards", "a pickle"])
def test_weights_in_other_files_are_read(tmp_path, kind):
    model = write_chinese_clip(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    if kind == "shards":
        model.save_pretrained(tmp_path / "hf", max_shard_size="3MB")
        assert (tmp_path / "hf/model.safetensors.index.json").is_file()
    else:
        old = {"text_model.embeddings.position_ids": torch.arange(512)[None]}
        torch.save(model.state_dict() | old, tmp_path / "hf/pytorch_model.bin")
    convert(tmp_path / "hf", tmp_path / "bundle", ConversionConfig())
    agree(model, load_bundle(tmp_path / "bundle"), BertTokenizer.from_pretrained(tmp_path / "hf"))


@pytest.mark.parametrize(
    "write", [pytest.param(write_clip, marks=pytest.mark.slow), write_chinese_clip]
)
def test_a_bundle_goes_back_to_a_folder_of_transformers(tmp_path, write):
    model = write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "bundle", ConversionConfig())
    bundle = load_bundle(tmp_path / "bundle")
    export(bundle, tmp_path / "back", "hf")
    again = type(model).from_pretrained(tmp_path / "back").eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(t.equal(model.state_dict()[n]) for n, t in again.state_dict().items())
    agree(again, bundle, AutoTokenizer.from_pretrained(tmp_path / "back"))
    convert(tmp_path / "back", tmp_path / "twice", ConversionConfig())
    twice = load_bundle(tmp_path / "twice")
    assert twice.model_cfg == bundle.model_cfg
    assert twice.preprocess_cfg == bundle.preprocess_cfg
    first, second = (
        sha256_of(tmp_path / name / "open_clip_model.safetensors") for name in ("bundle", "twice")
    )
    assert first == second  # the tokenizer's file is transformers' own, so fingerprints differ
    assert twice.tokenizer.encode(TEXTS).ids.equal(bundle.tokenizer.encode(TEXTS).ids)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    write_chinese_clip(tmp_path_factory.mktemp("hf") / "hf")
    return tmp_path_factory.getbasetemp() / "hf0" / "hf"


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "hf")


def test_preprocessing_is_never_guessed_but_may_be_said(folder, tmp_path):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json; expected that file"):
        convert(folder, tmp_path / "bundle", ConversionConfig())
    said = PreprocessConfig(mean=(0.1, 0.2, 0.3), resize_mode="longest")
    convert(folder, tmp_path / "bundle", ConversionConfig(preprocess=said))
    assert load_bundle(tmp_path / "bundle").preprocess_cfg["mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_mean": None}, "lacks 'image_mean'"),
        ({"resample": 0}, "lacks 0"),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True}, "expected images of 32 pixels"),
        ({"size": 32, "do_center_crop": False}, "either cut or squashed"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(folder, tmp_path, changes, said):
    changed(folder / "preprocessor_config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        convert(folder, tmp_path / "bundle", ConversionConfig())


def test_a_folder_without_tokenizer_asks_for_one(folder, tmp_path):
    (folder / "vocab.txt").unlink()
    with pytest.raises(Exception, match="there is no tokenizer"):
        convert(folder, tmp_path / "bundle", ConversionConfig())
    convert(folder, tmp_path / "bundle", ConversionConfig(tokenizer=str(VOCABULARY)))


def test_other_activations_are_refused(folder, tmp_path):
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    changed(folder / "config.json", vision_config=vision | {"hidden_act": "relu"})
    with pytest.raises(CheckpointError, match="hidden_act is relu; expected quick_gelu or gelu"):
        convert(folder, tmp_path / "bundle", ConversionConfig())


def test_a_folder_of_another_model_is_named(folder, tmp_path):
    changed(folder / "config.json", model_type="siglip")
    with pytest.raises(CheckpointError, match="is an unknown kind of folder; expected a bundle"):
        convert(folder, tmp_path / "bundle", ConversionConfig())


def test_a_context_beyond_the_positions_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is 513; the model has 512 positions"):
        convert(folder, tmp_path / "bundle", ConversionConfig(context_length=513))
