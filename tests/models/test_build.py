import json
import math
from dataclasses import replace

import open_clip
import pytest
import torch

from tests.builders import IMAGE_SIZE, TINY_MODEL, tiny_tokenizer
from vlm.errors import ConfigError
from vlm.models.build import build_encoder, build_from_config, encoder_model_cfg, image_size
from vlm.models.config import ModelConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.models.encoder import Encoder
from vlm.models.multiway import MultiwayEncoder
from vlm.models.multiway_config import MultiwayConfig
from vlm.text.tokenizer import Tokenizer

TINY_MULTIWAY = MultiwayConfig(
    image_size=IMAGE_SIZE,
    patch_size=16,
    width=32,
    heads=2,
    ffn_width=64,
    layers=1,
    vl_layers=1,
    embed_dim=16,
    text_positions=20,
)


@pytest.mark.parametrize(
    "config",
    [TINY_MODEL, ModelConfig(multiway=TINY_MULTIWAY, init_logit_bias=-10.0)],
    ids=["two towers", "multiway"],
)
def test_a_description_survives_json_and_builds_the_configured_model(config):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = build_from_config(config, tokenizer)
    torch.manual_seed(0)
    again = build_encoder(json.loads(json.dumps(encoder_model_cfg(config, tokenizer))))
    assert type(again) is (DualEncoder if config.multiway is None else MultiwayEncoder)
    assert isinstance(again, Encoder)
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.token_embedding.num_embeddings == tokenizer.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["RN50-quickgelu", "coca_ViT-B-32", "ViT-B-16-SigLIP2", "MobileCLIP-S1", "EVA02-B-16"]
)
def test_a_model_of_the_zoo_reads_the_tokenizers_ids_and_open_clip_can_express_it(name):
    tokenizer = tiny_tokenizer(context_length=24)
    described = encoder_model_cfg(ModelConfig(open_clip=name, init_logit_scale=10.0), tokenizer)
    text_cfg = described["text_cfg"]
    zoo = open_clip.get_model_config(name)
    last = zoo["text_cfg"].get("pool_type") == "last"
    assert text_cfg["pool_type"] == ("last" if last else "eos")
    assert (text_cfg["eos_id"], text_cfg["pad_id"]) == (3, 0)
    assert (text_cfg["vocab_size"], text_cfg["context_length"]) == (tokenizer.vocab_size, 24)
    assert not [key for key in text_cfg if key.startswith(("hf_", "tokenizer_", "output_"))]
    assert described["init_logit_scale"] == math.log(10)
    assert "init_logit_bias" not in described
    assert described.get("quick_gelu", False) == zoo.get("quick_gelu", False)
    assert image_size(described) == zoo["vision_cfg"]["image_size"]
    with torch.device("meta"):
        model = build_encoder(described)
        known = {key: value for key, value in described.items() if key != "custom_text"}
        expected = open_clip.CustomTextCLIP(**known).state_dict()
    found = {key.replace("log_logit", "logit"): v.shape for key, v in model.state_dict().items()}
    assert found == {key: tensor.shape for key, tensor in expected.items()}


def test_a_text_model_of_transformers_gets_the_tokenizers_sizes(monkeypatch):
    known = {
        "model_type": "roberta",
        "vocab_size": 9,
        "pad_token_id": 1,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 8,
    }
    names = []

    def read(name):
        names.append(name)
        return dict(known)

    monkeypatch.setattr("vlm.models.hugging_face_tower.read_hf_config", read)
    tokenizer = tiny_tokenizer(context_length=24)
    described = encoder_model_cfg(ModelConfig(open_clip="roberta-ViT-B-32"), tokenizer)
    assert names == ["roberta-base"]
    described["vision_cfg"] |= {"width": 64, "layers": 1}
    model = build_encoder(json.loads(json.dumps(described))).eval()
    assert model.token_embedding.num_embeddings == tokenizer.vocab_size
    tokens = tokenizer.encode(["小狗 " * 20, "tea"])
    assert tokens.ids.shape[1] == 24
    together = model.encode_text(tokens)
    torch.testing.assert_close(together[1:], model.encode_text(tokenizer.encode(["tea"])))


def test_an_unknown_model_of_the_zoo_is_named_with_near_ones():
    with pytest.raises(ConfigError, match=r"open_clip has no model 'ViT-B-33'; did you.*ViT-B-32"):
        build_from_config(ModelConfig(open_clip="ViT-B-33"), tiny_tokenizer())


def test_a_multiway_model_with_too_few_positions_for_the_tokenizer_is_refused():
    config = ModelConfig(multiway=TINY_MULTIWAY)
    with pytest.raises(ConfigError, match=r"positions for 18 tokens; expected at least .* 24"):
        encoder_model_cfg(config, tiny_tokenizer(context_length=24))


def test_a_multiway_model_needs_a_piece_that_begins_every_text():
    tokenizer = tiny_tokenizer()
    plain = Tokenizer(tokenizer.vocabulary, replace(tokenizer.config, begin_of_text=None))
    with pytest.raises(ConfigError, match="begins every text with the same piece"):
        encoder_model_cfg(ModelConfig(multiway=TINY_MULTIWAY), plain)


def test_images_that_the_patches_of_a_timm_transformer_do_not_fill_are_refused():
    tower = replace(TINY_MODEL.vision_cfg, timm_model_name="test_vit", image_size=40)
    with pytest.raises(ConfigError, match=r"image_size is 40; expected a multiple of .*, 16"):
        build_from_config(replace(TINY_MODEL, vision_cfg=tower), tiny_tokenizer())


def test_scale_and_bias_are_single_numbers_whatever_open_clip_made_them():
    described = encoder_model_cfg(replace(TINY_MODEL, init_logit_bias=-10.0), tiny_tokenizer())
    model = build_encoder(described | {"nonscalar_logit_scale": True, "init_logit_bias": -10})
    assert model.log_logit_scale.shape == model.logit_bias.shape == ()
    assert model.logit_bias == -10


def test_a_text_tower_whose_features_have_another_width_is_refused():
    described = encoder_model_cfg(TINY_MODEL, tiny_tokenizer())
    described["text_cfg"] |= {"proj_type": "none"}
    with pytest.raises(ConfigError, match="64 wide without a projection; expected embed_dim, 32"):
        build_encoder(described)


def test_images_that_are_not_square_have_no_one_side():
    described = encoder_model_cfg(TINY_MODEL, tiny_tokenizer())
    assert image_size(described) == IMAGE_SIZE
    assert image_size({"multiway": {"image_size": 48}}) == 48
    assert image_size({"vision_cfg": {"image_size": [64, 64]}}) == 64
    with pytest.raises(ConfigError, match="expected squares"):
        image_size({"vision_cfg": {"image_size": [64, 32]}})
