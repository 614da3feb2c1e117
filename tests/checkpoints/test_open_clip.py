"""open_clip's checkpoints say as bundles what open_clip makes of them, and go back to it."""

import json
from copy import deepcopy
from functools import cache

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.builders import IMAGE_SIZE, TINY_MODEL, make_image, tiny_model, tiny_tokenizer
from tests.checkpoints.sources import TEXTS, close, disturb, pixels
from tests.support.commands import ROOT
from vlm.bundle import load_bundle, save_bundle
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.conversion import convert
from vlm.checkpoints.export import export
from vlm.errors import CheckpointError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.models.build import encoder_model_cfg
from vlm.text.clip_bpe import clip_tokenizer
from vlm.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.peer

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49_408, "width": 64, "heads": 2, "layers": 2}
VIT = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
MODELS = {
    "vit": VIT,
    "vit-quickgelu": VIT | {"quick_gelu": True},
    "resnet": VIT | {"vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 8}},
    "timm": VIT
    | {"vision_cfg": {"timm_model_name": "test_resnet", "image_size": 32}, "custom_text": True},
    "siglip": VIT | {"custom_text": True, "init_logit_bias": -10, "nonscalar_logit_scale": True},
    "coca": {
        "embed_dim": 32,
        "vision_cfg": VISION
        | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49_408, "width": 64, "heads": 2,
                           "layers": 1, "attn_pooler_heads": 2},
        "custom_text": True,
    },
}  # fmt: skip
SAID = PreprocessConfig(mean=(0.1, 0.2, 0.3), resize_mode="squash")


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Put small models among those that open_clip knows by name."""
    configs = dict(open_clip.factory._MODEL_CONFIGS) | deepcopy(MODELS)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)


@cache
def build(name):
    torch.manual_seed(0)
    return disturb(open_clip.create_model(name))


clip_of_open_clip = cache(open_clip.SimpleTokenizer)  # a sixth of a second, by length


@torch.inference_mode()
def agree(model, bundle):
    close(bundle.model.encode_image(pixels(bundle)), model.encode_image(pixels(bundle)))
    length = model.context_length if hasattr(model, "context_length") else 76
    ids = clip_of_open_clip(context_length=length)(TEXTS)
    tokens = bundle.tokenizer.encode(TEXTS)
    assert bundle.tokenizer.encode(TEXTS, pad_to=length).ids.equal(ids)
    close(bundle.model.encode_text(tokens), model.encode_text(ids))
    scale = model.logit_scale.exp().reshape(())
    torch.testing.assert_close(bundle.model.logit_scale, scale)


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["a training checkpoint", "safetensors"])
def test_a_weights_file_gives_equal_features(tmp_path, name, kind):
    model = build(name)
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
    else:
        wrapped = {f"module.{n}": t for n, t in model.state_dict().items()}
        torch.save({"epoch": 1, "name": "x", "state_dict": wrapped}, path)
    said = convert(path, tmp_path / "bundle", ConversionConfig(model=name, preprocess=SAID))
    bundle = load_bundle(tmp_path / "bundle")
    agree(model, bundle)
    assert ("text_decoder." in " ".join(said)) == (name == "coca")
    assert bundle.preprocess_cfg["mean"] == [0.1, 0.2, 0.3]
    assert bundle.languages == ("en",)


@pytest.mark.usefixtures("zoo")
@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in MODELS if name != "coca"])
def test_open_clip_reads_a_converted_bundle(tmp_path, name):
    torch.save(build(name).state_dict(), tmp_path / "x.pt")
    config = ConversionConfig(model=name, preprocess=SAID)
    convert(tmp_path / "x.pt", tmp_path / "folder", config, target="open_clip")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'folder'}")
    bundle = load_bundle(tmp_path / "folder")
    agree(model.eval(), bundle)
    image = make_image(3, size=(70, 45))
    assert transform(image).equal(bundle.transform(image))


@pytest.mark.parametrize("name", ["vit", "siglip"])
@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_folder_gives_equal_features(tmp_path, name, file, request):
    request.getfixturevalue("zoo")
    model, folder = build(name), tmp_path / "folder"
    folder.mkdir()
    if file.endswith("bin"):
        torch.save(model.state_dict(), folder / file)
    else:
        save_file(model.state_dict(), folder / file)
    record = {
        "model_cfg": MODELS[name],
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "unknown": 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    convert(folder, tmp_path / "bundle", ConversionConfig())
    bundle = load_bundle(tmp_path / "bundle")
    agree(model, bundle)
    assert bundle.preprocess_cfg == {
        "size": 32, "mode": "RGB", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7],
        "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("named_by", ["a folder", "--hf_config"])
def test_a_text_tower_of_transformers_gives_equal_features(tmp_path, named_by, monkeypatch):
    tower = {"model_type": "bert", "vocab_size": 21_128, "hidden_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}  # fmt: skip
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps(tower))
    local = {
        "hf_model_name": str(tmp_path / "bert"), "hf_model_pretrained": False,
        "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler", "context_length": 20,
    }  # fmt: skip
    model = disturb(open_clip.CustomTextCLIP(32, VISION, local))
    cfg = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": local}
    if named_by == "--hf_config":
        cfg["text_cfg"] = local | {"hf_model_name": "nobody/no-such-model"}
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    record = {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    import cn_clip.clip as theirs

    vocabulary = theirs.__file__.replace("__init__.py", "vocab.txt")
    config = ConversionConfig(tokenizer=vocabulary)
    if named_by == "--hf_config":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(CheckpointError, match=r"or name its config\.json with --hf_config"):
            convert(folder, tmp_path / "bundle", config)
        config = ConversionConfig(tokenizer=vocabulary, hf_config=tmp_path / "bert")
    convert(folder, tmp_path / "bundle", config)
    bundle = load_bundle(tmp_path / "bundle")
    tokens = bundle.tokenizer.encode(TEXTS)
    close(bundle.model.encode_text(tokens), model.encode_text(tokens.ids))
    close(bundle.model.encode_image(pixels(bundle)), model.encode_image(pixels(bundle)))
    assert "hf_config" not in (tmp_path / "bundle/open_clip_config.json").read_text()
    assert json.loads((tmp_path / "bundle/vlm.json").read_text())["hf_config"]["hidden_size"] == 64

    export(bundle, tmp_path / "out", "open_clip")
    again, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    features = F.normalize(again.eval().encode_text(tokens.ids), dim=-1)
    torch.testing.assert_close(features, bundle.model.encode_text(tokens), rtol=0, atol=1e-5)


def saved(tmp_path, tensors):
    torch.save(tensors, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.usefixtures("zoo")
def test_a_file_does_not_say_its_model(tmp_path):
    path = saved(tmp_path, build("vit").state_dict())
    with pytest.raises(CheckpointError, match="does not say which; name it with --model"):
        convert(path, tmp_path / "bundle", ConversionConfig())
    with pytest.raises(CheckpointError, match="open_clip has no model 'vti'"):
        convert(path, tmp_path / "bundle", ConversionConfig(model="vti"))


@pytest.mark.usefixtures("zoo")
def test_another_model_than_the_files_is_refused_by_its_tensors(tmp_path):
    path = saved(tmp_path, build("vit").state_dict())
    with pytest.raises(CheckpointError, match=r"\d+ missing \(visual\.attnpool"):
        convert(path, tmp_path / "bundle", ConversionConfig(model="resnet", preprocess=SAID))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("ViT-H-14-quickgelu", "published checkpoints of ViT-H-14-quickgelu differ in it"),
        ("vit", "published checkpoints of vit do not exist"),
    ],
)
@pytest.mark.usefixtures("zoo")
def test_preprocessing_is_never_guessed(tmp_path, model, said):
    path = saved(tmp_path, build("vit").state_dict())
    with pytest.raises(CheckpointError, match=f"{said}; set them with --preprocess"):
        convert(path, tmp_path / "bundle", ConversionConfig(model=model))


@pytest.mark.parametrize(
    ("model", "mean", "mode"),
    [("ViT-B-32", 0.48145466, "shortest"), ("ViT-B-16-SigLIP", 0.5, "squash")],
)
def test_preprocessing_is_that_of_all_published_checkpoints(model, mean, mode):
    from vlm.checkpoints.open_clip import _published_preprocessing

    found = _published_preprocessing(model)
    assert (found.mean[0], found.resize_mode) == (mean, mode)


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize("lacking", ["preprocess_cfg", "mean", "model_cfg"])
def test_a_folder_that_leaves_something_open_is_refused(tmp_path, lacking):
    record = {"model_cfg": VIT, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (record["preprocess_cfg"] if lacking == "mean" else record).pop(lacking)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"lacks '{lacking}'"):
        convert(tmp_path, tmp_path / "bundle", ConversionConfig())


@pytest.mark.usefixtures("zoo")
def test_a_text_tower_of_open_clips_own_has_no_other_configuration(tmp_path):
    path = saved(tmp_path, build("vit").state_dict())
    config = ConversionConfig(model="vit", preprocess=PreprocessConfig(), hf_config=tmp_path)
    with pytest.raises(CheckpointError, match="own text tower; expected no --hf_config"):
        convert(path, tmp_path / "bundle", config)


def test_a_foreign_tokenizer_is_asked_for(tmp_path):
    cfg = VIT | {"text_cfg": TEXT | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}}
    record = {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(record))
    torch.save({"logit_scale": torch.zeros(())}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="SigLIP; name its files with --tokenizer"):
        convert(tmp_path, tmp_path / "bundle", ConversionConfig())


SIGLIP_TEXT = TEXT | {
    "context_length": 12,
    "vocab_size": 9,
    "no_causal_mask": True,
    "pool_type": "last",
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
}
WORDS = ("<unk>", "<pad>", "</s>", "a", "sleeping", "cat", "A", "cat!", "[CLS]")


def folder_with_a_tokenizer_of_transformers(folder, **kwargs):
    """Make a folder of open_clip's whose tower sees its padding; return its model."""
    rust = RustTokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    rust.pre_tokenizer = WhitespaceSplit()
    rust.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        sep_token="</s>",
    )  # fmt: skip
    fast.save_pretrained(folder)
    text = SIGLIP_TEXT | ({"tokenizer_kwargs": kwargs} if kwargs else {})
    record = {
        "model_cfg": VIT | {"text_cfg": text, "custom_text": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    torch.manual_seed(0)
    model = disturb(open_clip.CustomTextCLIP(VIT["embed_dim"], VISION, text))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@torch.inference_mode()
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"clean": "canonicalize"}, {"clean": "lower"}, {"strip_sep_token": True}],
    ids=["as it is", "canonical", "in lower case", "without its end"],
)
def test_a_tower_that_sees_its_padding_reads_as_in_open_clip(tmp_path, kwargs):
    folder = tmp_path / "folder"
    model = folder_with_a_tokenizer_of_transformers(folder, **kwargs)
    said = convert(folder, tmp_path / "bundle", ConversionConfig())
    assert said[0].endswith("is an open_clip checkpoint")
    bundle = load_bundle(tmp_path / "bundle")
    texts = ["a sleeping cat", "A cat!", "A  sleeping &amp; a cat", "sleeping"]
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
    close(bundle.model.encode_text(bundle.tokenizer.encode(texts)), model.encode_text(ids))


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("vit", "chinese-clip", "has BERT's text tower; the bundle's is a text transformer"),
        ("vit", "m2", "holds multiway towers; the bundle is a dual encoder"),
        ("resnet", "hf", "the bundle's image tower is a residual network"),
        ("timm", "hf", "the bundle's image tower is test_resnet"),
        ("siglip", "hf", "cannot express the model's init_logit_bias"),
        ("coca", "hf", "cannot express the model's text_cfg.embed_cls True, vision_cfg.atten"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, name, target, said):
    path = saved(tmp_path, build(name).state_dict())
    config = ConversionConfig(model=name, preprocess=PreprocessConfig())
    with pytest.raises(CheckpointError, match=said):
        convert(path, tmp_path / "out", config, target=target)
    assert not (tmp_path / "out").exists()


TOKENIZERS = {
    "clip": clip_tokenizer,
    "clip-zh": lambda: load_tokenizer(ROOT / "tokenizers/clip-zh"),
    "emoji-zh-en": lambda: load_tokenizer(ROOT / "tokenizers/emoji-zh-en"),
    "sp-zh-en": lambda: load_tokenizer(ROOT / "tokenizers/sp-zh-en"),
}


@pytest.mark.parametrize(
    ("name", "relative"),
    [*((name, False) for name in TOKENIZERS), ("emoji-zh-en", True)],
    ids=[*TOKENIZERS, "relative"],
)
def test_open_clip_takes_the_tokenizer_of_a_bundle(tmp_path, monkeypatch, name, relative):
    tokenizer = TOKENIZERS[name]()
    write_bundle(tmp_path / "bundle", tokenizer)
    monkeypatch.chdir(tmp_path)
    theirs = open_clip.get_tokenizer(f"local-dir:{'bundle' if relative else tmp_path / 'bundle'}")
    texts = [*TEXTS, "", "a &amp; b", "A  Café <|endoftext|> </s>", "word " * 100]
    ours = tokenizer.encode(texts, pad_to=tokenizer.context_length).ids
    same = (theirs(texts) == ours).all(dim=1).tolist()
    differing = [text for text, equal in zip(texts, same, strict=True) if not equal]
    # open_clip cleans as CLIP does before any tokenizer; these two do not.
    assert differing == (["a &amp; b"] if name in ("emoji-zh-en", "sp-zh-en") else [])
    assert load_bundle(tmp_path / "bundle").tokenizer.fast_files == tokenizer.fast_files


def test_open_clip_refuses_a_tokenizer_that_it_cannot_take(tmp_path):
    write_bundle(tmp_path / "bundle", tiny_tokenizer())
    with pytest.raises((OSError, ValueError)):
        open_clip.get_tokenizer(f"local-dir:{tmp_path / 'bundle'}")


def test_a_tokenizer_is_exported_with_a_bundle_for_open_clip(tmp_path):
    write_bundle(tmp_path / "bundle", tiny_tokenizer())
    assert export(load_bundle(tmp_path / "bundle"), tmp_path / "out", "open_clip") == []
    bundle = load_bundle(tmp_path / "out")
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert theirs(TEXTS).equal(bundle.tokenizer.encode(TEXTS, pad_to=16).ids)


def write_bundle(folder, tokenizer):
    save_bundle(
        folder,
        model=tiny_model(tokenizer),
        model_cfg=encoder_model_cfg(TINY_MODEL, tokenizer),
        preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
        tokenizer=tokenizer,
        languages=("zh", "en"),
    )
