from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import yaml

from vlm.errors import ConfigError
from vlm.models.multiway import MultiwayEncoder
from vlm.models.multiway_config import (
    TEMPERATURES,
    MultiwayConfig,
    is_held,
    released_tensors,
)

TRAINING_ONLY = ("itc_text_proj.", "itc_image_proj.", "backbone.vision_embed.mask_token")
CONFIGS = Path(__file__).parents[2] / "configs/model"
M2_VOCABULARY = 115_244
TINY = MultiwayConfig(image_size=12, patch_size=4, width=8, heads=2, layers=2, vl_layers=2)


def read_config(name):
    description = yaml.safe_load((CONFIGS / name).read_text())
    return MultiwayConfig(**description["multiway"])


@pytest.mark.parametrize(
    ("size", "parameters", "tensors", "used"),
    [
        ("0.4b", 263_289_602, 505, 240.2e6),
        ("1b", 730_416_130, 985, 689.4e6),
        ("10b", 10_182_004_738, 985, 9.553e9),
    ],
)
def test_the_inventory_is_that_of_the_released_models(size, parameters, tensors, used):
    config = read_config(f"m2-{size}.yaml")
    inventory = released_tensors(config, M2_VOCABULARY)
    assert sum(map(prod, inventory.values())) == parameters
    assert len(inventory) == tensors
    read = {name for name in inventory if is_held(name) and not name.startswith(TRAINING_ONLY)}
    counted = sum(prod(inventory[name]) for name in read)
    assert counted == pytest.approx(used, rel=5e-4)
    with torch.device("meta"):
        model = MultiwayEncoder(config, vocab_size=M2_VOCABULARY)
    ours = {TEMPERATURES.get(n, n): tuple(t.shape) for n, t in model.state_dict().items()}
    assert ours == {name: shape for name, shape in inventory.items() if is_held(name)}
    held = sum(map(prod, ours.values()))
    assert f"{held:,}" in (CONFIGS / f"m2-{size}.yaml").read_text()


def test_the_tensors_without_a_place_or_a_use_are_those_known():
    inventory = released_tensors(TINY, 11)
    dropped = {name for name in inventory if not is_held(name)}
    outer = {name for name in dropped if not name.startswith("backbone_vl.")}
    assert outer == {"norm.weight", "norm.bias", "pooler.dense.weight", "pooler.dense.bias"}
    assert all(".B." in name for name in dropped - outer)
    assert len(dropped - outer) == 20 * TINY.vl_layers + 2


def test_the_tiny_model_reads_emoji_in_few_parameters():
    config = read_config("m2-tiny.yaml")
    model = MultiwayEncoder(config, vocab_size=100)
    assert config.image_size == 48
    assert 1.0e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    assert model.encode_image(torch.randn(2, 3, 48, 48)).shape == (2, config.embed_dim)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width is 8; expected a multiple of heads, 3"),
        ({"patch_size": 5}, "image_size is 12; expected a multiple of patch_size, 5"),
        ({"vl_layers": 0}, "vl_layers is 0; expected an integer, at least 1"),
        ({"width": -8}, "width is -8; expected an integer, at least 1"),
        ({"text_positions": 2}, "text_positions is 2; expected more than 2"),
        ({"drop_path": 1.0}, "drop_path is 1.0; expected"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **changes)
