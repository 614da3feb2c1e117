"""All models of open_clip's zoo: the same weights by name, and the same features from them."""

import copy
import json

import open_clip
import pytest
import torch
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.tokenizer import SimpleTokenizer
from torch.overrides import TorchFunctionMode

from tests.builders import tiny_tokenizer
from vlm.models.build import build_encoder, image_size
from vlm.models.encoder import MAIN, Encoder
from vlm.text.tokenizer import TokenBatch

pytestmark = pytest.mark.peer

CAPTIONS = [
    "红苹果",
    "a very small dog",
    "an old house behind a tall tree, 老房子",
    "tea",
]

BERT_LIKE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
HF_CONFIGS = {
    "roberta": BERT_LIKE | {"model_type": "roberta"},
    "xlm-roberta": BERT_LIKE | {"model_type": "xlm-roberta"},
    "mt5": {
        "model_type": "mt5",
        "vocab_size": 320,
        "d_model": 64,
        "num_layers": 2,
        "num_decoder_layers": 1,
        "num_heads": 2,
        "d_kv": 32,
        "d_ff": 96,
    },
    "nllb": {
        "model_type": "m2m_100",
        "vocab_size": 320,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
    },
}


def zoo_config(name):
    """Return a config of the zoo, with a small model in the place of one of transformers."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    text_model = config["text_cfg"].get("hf_model_name")
    if text_model:
        kind = text_model.rpartition("/")[2].rpartition("-")[0].partition("-200")[0]
        config["text_cfg"]["hf_config"] = HF_CONFIGS[kind]
    return config


def by_open_clip(config, folder):
    """Build a model with open_clip's own classes, as its factory chooses among them."""
    config = copy.deepcopy(config)
    text_cfg = config["text_cfg"]
    hf_config = text_cfg.pop("hf_config", None)
    if hf_config is not None:
        (folder / "config.json").write_text(json.dumps(hf_config))
        text_cfg |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    custom_text = config.pop("custom_text", False) or hf_config is not None
    if "multimodal_cfg" in config:
        return open_clip.CoCa(**config)
    return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**config)


class Unset(TorchFunctionMode):
    """Leave weights as they are allocated: on the meta device there is nothing to draw."""

    DRAWING = ("normal_", "uniform_", "kaiming_uniform_", "erfinv_", "clamp_", "fill_", "zero_")
    SCALING = ("mul_", "add_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in self.DRAWING + self.SCALING:
            return args[0] if args else kwargs["tensor"]  # as torch.nn.init passes it
        return func(*args, **kwargs)


def state_of(model):
    """Return the weights of open_clip's model without CoCa's decoder, by our names."""
    state = convert_to_custom_text_state_dict(dict(model.state_dict()))
    kept = {name: t for name, t in state.items() if not name.startswith("text_decoder.")}
    return {name.replace("logit_scale", "log_logit_scale"): t for name, t in kept.items()}


@pytest.mark.parametrize("name", open_clip.list_models())
def test_every_model_builds_with_the_weights_that_open_clip_gives_it(name, tmp_path):
    config = zoo_config(name)
    with torch.device("meta"), Unset():
        found = build_encoder(config).state_dict()
        expected = state_of(by_open_clip(config, tmp_path))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


TEXT = {"width": 64, "heads": 2, "layers": 2}
VIT = {"width": 64, "layers": 2, "head_width": 32}
# A tokenizer that is not CLIP's; its padding is 0, its begin 2 and its end of text 3.
FOREIGN = {"vocab_size": 320, "context_length": 40}


def timm_model(name, size, **vision_cfg):
    return {"timm_model_name": name, "image_size": size} | vision_cfg


SMALL = {
    "ViT-B-32-quickgelu": {"vision_cfg": VIT, "text_cfg": TEXT},
    "ViT-M-16-alt": {"vision_cfg": VIT, "text_cfg": TEXT},
    "RN50": {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16}, "text_cfg": TEXT},
    "ViT-L-14-CLIPA": {"vision_cfg": VIT, "text_cfg": TEXT | FOREIGN},
    "ViT-H-14-worldwide": {"vision_cfg": VIT, "text_cfg": TEXT | FOREIGN | {"eos_id": 3}},
    "coca_ViT-B-32": {"vision_cfg": VIT, "text_cfg": TEXT},
    "coca_base": {"vision_cfg": VIT, "text_cfg": TEXT | FOREIGN},
    "coca_roberta-ViT-B-32": {"vision_cfg": VIT},
    "roberta-ViT-B-32": {"vision_cfg": VIT},
    "xlm-roberta-base-ViT-B-32": {"vision_cfg": VIT},
    "mt5-base-ViT-B-32": {"vision_cfg": VIT},
    "nllb-clip-base": {"vision_cfg": VIT},
    "ViT-B-16-SigLIP": {
        "embed_dim": 64,
        "vision_cfg": timm_model("test_vit", 160),
        "text_cfg": TEXT | FOREIGN,
    },
    "ViT-B-16-SigLIP2": {
        "embed_dim": 96,
        "vision_cfg": timm_model("test_vit3", 160),
        "text_cfg": TEXT | FOREIGN | {"pad_id": 7},
    },
    "ViT-SO400M-16-SigLIP-i18n-256": {
        "embed_dim": 64,
        "vision_cfg": timm_model("test_vit", 160),
        "text_cfg": TEXT | FOREIGN,
    },
    "MobileCLIP-S1": {"vision_cfg": timm_model("fastvit_t8", 256), "text_cfg": TEXT},
    "convnext_base": {"vision_cfg": timm_model("test_convnext", 160), "text_cfg": TEXT},
    "swin_base_patch4_window7_224": {
        "vision_cfg": timm_model("swin_tiny_patch4_window7_224", 224),
        "text_cfg": TEXT,
    },
    "EVA02-B-16": {"vision_cfg": timm_model("eva02_tiny_patch14_224", 224), "text_cfg": TEXT},
    "PE-Core-T-16-384": {"text_cfg": TEXT},
    "ViTamin-S": {"text_cfg": TEXT},
}


def small_config(name):
    config = zoo_config(name)
    for part, changes in SMALL[name].items():
        config[part] = config[part] | changes if isinstance(changes, dict) else changes
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= TEXT
    return config


def padded_ids(config):
    """Return the ids of the captions as open_clip's tokenizers pad them, and which are text."""
    text_cfg = config["text_cfg"]
    if text_cfg.get("vocab_size", 49408) == 49408 and "hf_config" not in text_cfg:
        ids = SimpleTokenizer(context_length=text_cfg.get("context_length", 77))(CAPTIONS)
        ends = (ids == ids.max()).long().argmax(dim=1, keepdim=True)
        return ids, torch.arange(ids.shape[1]) <= ends
    tokens = tiny_tokenizer(context_length=38).encode(CAPTIONS, pad_to=38)
    padding = text_cfg.get("hf_config", text_cfg).get("pad_token_id", text_cfg.get("pad_id", 0))
    ids = tokens.ids.masked_fill(~tokens.mask, padding)
    if "hf_config" not in text_cfg:
        ids = torch.nn.functional.pad(ids, (0, 2), value=padding)
    return ids, torch.nn.functional.pad(tokens.mask, (0, ids.shape[1] - 38))


@torch.no_grad()
def scatter(model):
    """Give a model weights that leave nothing at zero or nearly so."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim <= 1 or parameter.std() < 0.03:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.05 * torch.randn(buffer.shape, generator=generator))
    return model


# The smallest of their kind that timm has.
LARGEST = ("ViTamin-S", "swin_base_patch4_window7_224", "PE-Core-T-16-384")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGEST)) for n in SMALL]
)
def test_features_and_gradients_are_those_of_open_clip_on_the_same_weights(name, tmp_path):
    torch.manual_seed(0)
    config = small_config(name)
    model = scatter(build_encoder(config)).eval()
    assert isinstance(model, Encoder)
    reference = by_open_clip(config, tmp_path).eval()
    ours = state_of(reference)
    assert ours.keys() == model.state_dict().keys()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            ours[key].copy_(tensor)
    images = torch.randn(2, 3, *2 * [image_size(config)])
    image, expected_image = (
        model.encode_image(images),
        reference.encode_image(images, normalize=True),
    )
    torch.testing.assert_close(image, expected_image, rtol=0, atol=1e-5)
    with torch.no_grad():
        states = model.image_states(images)
    unit = torch.nn.functional.normalize(states.features[MAIN], dim=-1)
    torch.testing.assert_close(unit, expected_image, rtol=0, atol=1e-5)
    rows, columns = model.grid_size
    assert states.tokens.shape == (2, rows * columns, model.image_width)
    assert model.embed_dim == image.shape[1]

    ids, mask = padded_ids(config)
    longest = int(mask.sum(dim=1).max())
    assert longest < ids.shape[1]
    # Padding that is not open_clip's, to the longest text only.
    tokens = TokenBatch(ids.masked_fill(~mask, 5)[:, :longest], mask[:, :longest])
    text, expected = model.encode_text(tokens), reference.encode_text(ids, normalize=True)
    torch.testing.assert_close(text, expected, rtol=0, atol=1e-5)
    assert (text[0] - text[1]).abs().max() > 1e-3
    assert model.text_states(tokens).tokens.shape == (*tokens.ids.shape, model.text_width)

    (text * image[:1]).sum().backward()
    (expected * expected_image[:1]).sum().backward()
    for parameter in reference.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    wanted = state_of(reference)
    largest = max(float(each.abs().max()) for each in wanted.values())
    assert largest > 0
    for key, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-5 * largest)
