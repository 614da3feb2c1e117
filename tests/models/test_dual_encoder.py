from dataclasses import replace

import pytest
import torch

from tests.builders import TINY_MODEL, tiny_tokenizer
from vlm.errors import ConfigError
from vlm.models.build import build_encoder, build_from_config, encoder_model_cfg
from vlm.models.config import ImageTowerConfig
from vlm.models.encoder import MAIN, Encoder


@pytest.mark.parametrize(
    "name", ["resnet10t", "test_vit", "test_convnext", "test_mambaout", "mobilenetv3_small_050"]
)
def test_any_timm_image_model_becomes_a_tower_at_any_size(name):
    tokenizer = tiny_tokenizer()
    tower = ImageTowerConfig(timm_model_name=name, image_size=64)
    model = build_from_config(replace(TINY_MODEL, vision_cfg=tower), tokenizer).eval()
    image = model.encode_image(torch.randn(2, 3, 64, 64))
    for vectors in (image, model.encode_text(tokenizer.encode(["红苹果", "小狗"]))):
        assert vectors.shape == (2, TINY_MODEL.embed_dim)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(model.logit_scale.item(), 1 / 0.07, rtol=1e-6, atol=0)


def test_the_scale_stays_at_most_a_hundred_and_keeps_its_gradient_after_clamping():
    model = build_from_config(replace(TINY_MODEL, init_logit_scale=100.0), tiny_tokenizer())
    assert 99.99 < model.logit_scale <= 100
    with torch.no_grad():
        model.log_logit_scale += 1
    model.clamp_logit_scale()
    scale = model.logit_scale
    assert 99.99 < scale <= 100
    scale.backward()
    torch.testing.assert_close(model.log_logit_scale.grad, scale.detach())


def test_a_scale_next_to_a_bias_has_no_bound():
    """SigLIP So400m/14 at 384 pixels was released with 112.3."""
    model = build_from_config(replace(TINY_MODEL, init_logit_bias=-16.5), tiny_tokenizer())
    with torch.no_grad():
        model.log_logit_scale.fill_(4.7215)
    model.clamp_logit_scale()
    assert model.logit_scale > 112


def test_a_description_for_open_clip_builds_the_same_towers():
    tokenizer = tiny_tokenizer()
    model = build_from_config(TINY_MODEL, tokenizer)
    again = build_encoder(encoder_model_cfg(TINY_MODEL, tokenizer))
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in again.state_dict().items()
    }
    torch.testing.assert_close(model.logit_scale, again.logit_scale)


def test_an_unknown_image_model_is_named_with_near_ones():
    tower = ImageTowerConfig(timm_model_name="resnet10x", image_size=32)
    with pytest.raises(ConfigError, match=r"timm has no model 'resnet10x'.*resnet"):
        build_from_config(replace(TINY_MODEL, vision_cfg=tower), tiny_tokenizer())


@pytest.mark.parametrize("scale", [0.0, -1.0, 101.0])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(ConfigError, match="init_logit_scale"):
        replace(TINY_MODEL, init_logit_scale=scale)


def test_states_bring_the_features_that_are_normalised_to_unit_vectors():
    tokenizer = tiny_tokenizer()
    model = build_from_config(TINY_MODEL, tokenizer).eval()
    assert isinstance(model, Encoder)
    images, tokens = torch.randn(2, 3, 32, 32), tokenizer.encode(["红苹果", "a small dog"])
    for states, features, unit in (
        (model.image_states(images), model.image_features(images), model.encode_image(images)),
        (model.text_states(tokens), model.text_features(tokens), model.encode_text(tokens)),
    ):
        torch.testing.assert_close(states.features, features)
        normalised = torch.nn.functional.normalize(features[MAIN], dim=1)
        torch.testing.assert_close(normalised, unit)
    assert model.logit_scales == {MAIN: model.logit_scale}


def test_a_hidden_patch_is_not_seen():
    model = build_from_config(TINY_MODEL, tiny_tokenizer()).eval()
    rows, columns = model.grid_size
    hidden = torch.zeros(1, rows * columns, dtype=torch.bool)
    hidden[0, 0] = True
    images = torch.randn(1, 3, 32, 32)
    blank = images.clone()
    blank[:, :, : 32 // rows, : 32 // columns] = 0
    found, expected = model.image_states(images, hidden), model.image_states(blank)
    torch.testing.assert_close(found.tokens, expected.tokens)
    torch.testing.assert_close(found.features, expected.features)
    assert found.mask is None
