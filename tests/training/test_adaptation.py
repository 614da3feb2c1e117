import pytest
import torch

from tests.builders import IMAGE_SIZE, tiny_model, tiny_tokenizer
from tests.models.test_pretraining import TINY_MULTIWAY
from vlm.errors import ConfigError
from vlm.models.build import build_from_config
from vlm.training.adaptation import adapt
from vlm.training.config import AdaptationConfig


def trained_names(encoder):
    return {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def test_nothing_asked_for_changes_nothing():
    encoder = tiny_model(tiny_tokenizer())
    adapt(encoder, AdaptationConfig())
    assert trained_names(encoder) == set(dict(encoder.named_parameters()))


def test_a_locked_tower_may_leave_its_last_stages_to_train():
    encoder = tiny_model(tiny_tokenizer())
    adapt(encoder, AdaptationConfig(image_unlocked_groups=1, text_unlocked_groups=0))
    assert trained_names(encoder) == {"log_logit_scale", "visual.head.proj.weight"}


def test_adapters_of_one_tower_go_with_a_locked_other():
    encoder = tiny_model(tiny_tokenizer())
    adapt(encoder, AdaptationConfig(image_unlocked_groups=0, lora_rank=2, lora_towers=("text",)))
    trained = trained_names(encoder) - {"log_logit_scale"}
    assert trained
    assert all("lora_" in name and name.startswith("text.") for name in trained)


def test_adapters_without_a_tower_are_refused():
    with pytest.raises(ConfigError, match="lora_towers names no tower"):
        adapt(tiny_model(tiny_tokenizer()), AdaptationConfig(lora_rank=2, lora_towers=()))


def test_patch_dropout_needs_patches():
    with pytest.raises(ConfigError, match="patch"):
        adapt(tiny_model(tiny_tokenizer()), AdaptationConfig(patch_dropout=0.5))


def test_patch_dropout_and_checkpointing_reach_a_multiway_model():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    encoder = build_from_config(TINY_MULTIWAY, tokenizer)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    plain = encoder.encode_image(images)
    adapt(encoder, AdaptationConfig(patch_dropout=0.5, grad_checkpointing="blocks"))
    assert not torch.allclose(encoder.train().encode_image(images), plain)
    torch.testing.assert_close(encoder.eval().encode_image(images), plain)
