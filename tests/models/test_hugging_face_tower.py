import json
import socket

import open_clip
import pytest
import torch

from tests.builders import IMAGE_SIZE, tiny_tokenizer
from vlm.errors import ConfigError
from vlm.models import hugging_face_tower
from vlm.models.blocks import recompute
from vlm.models.build import build_encoder
from vlm.models.encoder import MAIN
from vlm.models.text_tower import text_blocks
from vlm.text.tokenizer import TokenBatch

pytestmark = pytest.mark.peer

TEXTS = ["红苹果", "a very small dog", "old house 老房子", "tea"]
SIZES = {"vocab_size": 320, "pad_token_id": 1, "max_position_embeddings": 40}
BERT_LIKE = SIZES | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}
HF_CONFIGS = {
    "bert": BERT_LIKE | {"model_type": "bert", "pad_token_id": 0},
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
    "m2m_100": SIZES
    | {
        "model_type": "m2m_100",
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
    },
}

types = pytest.mark.parametrize("model_type", HF_CONFIGS)
poolers = pytest.mark.parametrize(
    "pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"]
)


def model_cfg(model_type, pooler="mean_pooler", **text_cfg):
    return {
        "embed_dim": 32,
        "vision_cfg": {"timm_model_name": "test_resnet", "image_size": IMAGE_SIZE},
        "text_cfg": {
            "hf_model_name": "somebody/some-model",
            "hf_config": HF_CONFIGS[model_type],
            "hf_pooler_type": pooler,
            "hf_model_pretrained": True,
        }
        | text_cfg,
    }


def built(*args, **text_cfg):
    torch.manual_seed(0)
    return build_encoder(model_cfg(*args, **text_cfg)).eval()


def by_open_clip(folder, cfg):
    """Build the tower as open_clip does, from a folder that has the configuration."""
    (folder / "config.json").write_text(json.dumps(cfg["hf_config"]))
    known = {k: v for k, v in cfg.items() if k != "hf_config"}
    text_cfg = known | {"hf_model_name": str(folder), "hf_model_pretrained": False}
    vision_cfg = {"timm_model_name": "test_resnet", "image_size": IMAGE_SIZE}
    return open_clip.CustomTextCLIP(32, vision_cfg, text_cfg).text.eval()


def with_padding(tokens, pad_id, length):
    ids = tokens.ids.masked_fill(~tokens.mask, pad_id)
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=pad_id)


def tokens_of_texts(tokenizer):
    """Ids that open_clip would not mistake for padding."""
    tokens = tokenizer.encode(TEXTS)
    return TokenBatch(tokens.ids.clamp(min=2).masked_fill(~tokens.mask, 300), tokens.mask)


def hf_config_of(tower):
    """Return a tower's configuration without where it came from and the type of its weights."""
    foreign = ("_name_or_path", "transformers_version", "dtype")
    return {n: value for n, value in tower.config.to_dict().items() if n not in foreign}


@types
@poolers
@pytest.mark.parametrize("projection", ["mlp", "linear"])
def test_features_and_gradients_are_those_of_open_clip_on_the_full_context(
    tmp_path, projection, pooler, model_type
):
    cfg = model_cfg(model_type, pooler, hf_proj_type=projection)
    tower = built(model_type, pooler, hf_proj_type=projection).text.double()
    reference = by_open_clip(tmp_path, cfg["text_cfg"]).double()
    assert tower.state_dict().keys() == reference.state_dict().keys()
    reference.load_state_dict(tower.state_dict())
    tokens = tokens_of_texts(tiny_tokenizer())
    features, states = hugging_face_tower.run(tower, tokens)
    reference.output_tokens = False
    ids = with_padding(tokens, reference.config.pad_token_id, 24)
    expected = reference(ids)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-11)
    assert states.shape == (*tokens.ids.shape, 64)
    found = torch.autograd.grad(
        features.square().sum(), list(tower.parameters()), materialize_grads=True
    )
    wanted = torch.autograd.grad(
        expected.square().sum(), list(reference.parameters()), materialize_grads=True
    )
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-10)


@types
def test_a_replaced_embedding_is_as_if_the_row_of_the_token_were_another(model_type):
    model = built(model_type).double()
    tokens = tokens_of_texts(tiny_tokenizer())
    replaced_id = tokens.ids[1, 2]
    vector = torch.randn(model.text_width, dtype=torch.float64)
    found = model.text_states(tokens, (tokens.ids == replaced_id, vector))
    with torch.no_grad():
        scale = getattr(model.token_embedding, "embed_scale", 1.0)
        model.token_embedding.weight[replaced_id] = vector / scale
    wanted = model.text_states(tokens)
    torch.testing.assert_close(found.tokens[tokens.mask], wanted.tokens[tokens.mask])
    torch.testing.assert_close(found.features[MAIN], wanted.features[MAIN])
    assert found.mask is tokens.mask


@types
def test_checkpointing_changes_no_gradient(model_type):
    model = built(model_type, "cls_pooler").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
        for module in model.text.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    tokens = tokens_of_texts(tiny_tokenizer())
    results = []
    for again in (False, True):
        if again:
            recompute(text_blocks(model.text))
        features = model.encode_text(tokens)
        weight = model.token_embedding.weight
        results.append(torch.autograd.grad(features[:, 0].sum(), weight)[0])
    torch.testing.assert_close(*results)


@types
def test_weights_are_grouped_from_the_embeddings_to_the_projection(model_type):
    model = built(model_type, "cls_pooler")
    groups = model.text_groups()
    inside = [id(parameter) for group in groups for parameter in group]
    assert sorted(inside) == sorted(id(parameter) for parameter in model.text.parameters())
    assert any(parameter is model.token_embedding.weight for parameter in groups[0])
    assert {id(each) for each in groups[-1]} == {id(each) for each in model.text.proj.parameters()}
    assert len(groups) == 4  # embeddings, two layers, the projection


@types
def test_a_towers_configuration_builds_it_again_without_the_network(model_type, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = built(model_type)
    config = hf_config_of(model.text)
    json.dumps(config)
    again = built(model_type, hf_config=config | {"dtype": "float16", "_name_or_path": "x"})
    assert {k: (v.shape, v.dtype) for k, v in again.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in model.state_dict().items()
    }
    assert hf_config_of(again.text) == config
    tokens = tokens_of_texts(tiny_tokenizer())
    torch.testing.assert_close(again.encode_text(tokens), model.encode_text(tokens))


def test_a_configuration_that_is_not_on_the_machine_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text_cfg = {"hf_config": None, "hf_model_name": "nobody/no-such-model"}
    with pytest.raises(ConfigError, match=r"`hf download nobody/no-such-model config.json`"):
        built("bert", **text_cfg)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS["bert"]))
    assert built("bert", hf_config=None, hf_model_name=str(tmp_path)).text_width == 64


@pytest.mark.parametrize("model_type", ["gpt2", "no-such-type", None])
def test_models_that_open_clip_has_no_adapter_to_are_refused(model_type):
    with pytest.raises(ConfigError, match=f"of type {model_type!r}; expected one of roberta"):
        built("bert", hf_config={"model_type": model_type})


def test_what_open_clip_builds_and_cannot_run_is_refused():
    with pytest.raises(ConfigError, match="pools by 'max_pooler', which open_clip cannot run"):
        built("bert", "max_pooler")
    with pytest.raises(ConfigError, match="expected hf_proj_type linear or mlp"):
        built("bert", hf_proj_type=None)


def test_without_transformers_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setattr(hugging_face_tower, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm\[hf\]'"):
        built("bert")
