"""Chinese-CLIP's checkpoints say as bundles what `cn_clip` itself makes of them."""

import json
import sys
from pathlib import Path

import cn_clip.clip
import pytest
import torch
from cn_clip.clip.model import CLIP

from tests.builders import make_image
from tests.checkpoints.sources import TEXTS, close, disturb, pixels
from vlm.bundle import load_bundle
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.conversion import convert
from vlm.checkpoints.export import export
from vlm.errors import CheckpointError

pytestmark = pytest.mark.peer

CONFIGS = Path(cn_clip.clip.__file__).with_name("model_configs")
BASE, LARGE = "RoBERTa-wwm-ext-base-chinese", "RoBERTa-wwm-ext-large-chinese"
SIZES = {
    "ViT-B-16": BASE,
    "ViT-L-14": BASE,
    "ViT-L-14-336": BASE,
    "ViT-H-14": LARGE,
    "RN50": "RBT3-chinese",
}
LAYERS = {"vision_layers": 2, "text_num_hidden_layers": 1}


def build(vision, text, **changes):
    """Build cn_clip's model of a size, as its own `create_model` does."""
    config = {
        name: value
        for size in (vision, text)
        for name, value in json.loads((CONFIGS / f"{size}.json").read_text()).items()
    }
    if isinstance(config["vision_layers"], str):
        config["vision_layers"] = json.loads(config["vision_layers"])
        changes = changes | ({"vision_layers": [1, 2, 1, 1]} if changes else {})
    torch.manual_seed(0)
    return disturb(CLIP(**config | changes))


def save(model, path):
    # Published files have BERT's pooler as well.
    tensors = model.state_dict() | {"bert.pooler.dense.bias": torch.zeros(4)}
    state = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


@pytest.fixture
def small(tmp_path):
    """A model of Chinese-CLIP's kind that has none of the published widths."""
    sizes = {
        "embed_dim": 48, "vision_width": 128, "image_resolution": 64, "text_hidden_size": 128,
        "text_num_attention_heads": 2, "text_intermediate_size": 256,
        "text_max_position_embeddings": 96,
    }  # fmt: skip
    model = build("ViT-B-16", BASE, **LAYERS, **sizes)
    return model, save(model, tmp_path / "small.pt")


@torch.inference_mode()
def agree(model, bundle):
    ids = cn_clip.clip.tokenize(TEXTS, context_length=52)
    assert bundle.tokenizer.encode(TEXTS, pad_to=52).ids.equal(ids.long())
    close(bundle.model.encode_text(bundle.tokenizer.encode(TEXTS)), model.encode_text(ids))
    images = pixels(bundle, 2)
    close(bundle.model.encode_image(images), model.encode_image(images))
    torch.testing.assert_close(bundle.model.logit_scale, model.logit_scale.exp())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_every_published_size_at_reduced_depth_gives_equal_features(tmp_path, size):
    model = build(size, SIZES[size], **LAYERS)
    said = convert(save(model, tmp_path / "x.pt"), tmp_path / "bundle", ConversionConfig())
    bundle = load_bundle(tmp_path / "bundle")
    agree(model, bundle)
    assert "on purpose: bert.pooler.dense.bias" in said[1]
    assert bundle.languages == ("zh",)
    side = json.loads((CONFIGS / f"{size}.json").read_text())["image_resolution"]
    assert bundle.preprocess_cfg["size"] == side


@pytest.mark.slow
def test_a_published_size_at_full_depth_gives_equal_features(tmp_path):
    model = build("RN50", "RBT3-chinese")
    convert(save(model, tmp_path / "x.pt"), tmp_path / "bundle", ConversionConfig())
    agree(model, load_bundle(tmp_path / "bundle"))


def test_images_are_prepared_as_cn_clip_prepares_them(small, tmp_path):
    convert(small[1], tmp_path / "bundle", ConversionConfig())
    transform = cn_clip.clip.image_transform(64)
    image = make_image(2, size=(90, 50))
    assert load_bundle(tmp_path / "bundle").transform(image).equal(transform(image))


def test_half_precision_becomes_float32(small, tmp_path):
    model, _ = small
    save(model.half(), tmp_path / "half.pt")
    convert(tmp_path / "half.pt", tmp_path / "bundle", ConversionConfig())
    model.float()
    agree(model, load_bundle(tmp_path / "bundle"))


def test_a_bundle_goes_back_to_the_tensors_that_it_came_from(small, tmp_path):
    model, path = small
    convert(path, tmp_path / "bundle", ConversionConfig())
    export(load_bundle(tmp_path / "bundle"), tmp_path / "back.pt", "chinese-clip")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["state_dict"]
    original = model.state_dict()
    assert {name.removeprefix("module.") for name in back} == original.keys()
    assert all(original[n.removeprefix("module.")].equal(t) for n, t in back.items())


def test_without_a_tokenizer_one_is_asked_for(small, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.checkpoints.chinese_clip.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"vocab\.txt with --tokenizer"):
        convert(small[1], tmp_path / "bundle", ConversionConfig())
    vocabulary = CONFIGS.with_name("vocab.txt")
    convert(small[1], tmp_path / "bundle", ConversionConfig(tokenizer=str(vocabulary)))
    agree(small[0], load_bundle(tmp_path / "bundle"))


def test_the_package_that_has_the_vocabulary_is_not_imported(small, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cn_clip"]:
        monkeypatch.delitem(sys.modules, name)
    convert(small[1], tmp_path / "bundle", ConversionConfig())
    assert "cn_clip" not in sys.modules


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("visual.ln_post.bias", None, r"1 missing \(visual\.ln_post\.bias\)"),
        ("visual.extra", torch.zeros(2), r"1 unexpected \(visual\.extra\)"),
        ("text_projection", torch.zeros(128, 47), r"visual\.proj is \[128, 48\]"),
        ("visual.positional_embedding", None, "image tower's size is unknown"),
        ("bert.embeddings.position_embeddings.weight", None, "text tower's size is unknown"),
    ],
)
def test_tensors_that_do_not_fit_are_named(small, tmp_path, name, change, said):
    state = dict(small[0].state_dict()) | {name: change}
    torch.save({n: t for n, t in state.items() if t is not None}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=said):
        convert(tmp_path / "x.pt", tmp_path / "bundle", ConversionConfig())
    assert not (tmp_path / "bundle").exists()


def test_a_tokenizer_with_more_ids_than_rows_is_refused(small, tmp_path):
    with pytest.raises(CheckpointError, match="has 49408 ids and the model 21128 rows"):
        convert(small[1], tmp_path / "bundle", ConversionConfig(tokenizer="clip"))
