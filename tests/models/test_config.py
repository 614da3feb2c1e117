import pytest

from vlm.errors import ConfigError
from vlm.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from vlm.models.multiway_config import MultiwayConfig


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"open_clip": "RN50", "multiway": MultiwayConfig()}, "open_clip and multiway"),
        ({"open_clip": "RN50", "embed_dim": 64}, "open_clip and embed_dim"),
        ({"open_clip": "RN50", "text_cfg": TextTowerConfig(layers=2)}, "open_clip and text_cfg"),
        (
            {"multiway": MultiwayConfig(), "vision_cfg": ImageTowerConfig(image_size=32)},
            "multiway and vision_cfg",
        ),
    ],
)
def test_a_model_that_is_described_twice_is_refused(settings, named):
    with pytest.raises(ConfigError, match=f"^{named} describe one model's towers more than once"):
        ModelConfig(**settings)


def test_towers_of_one_kind_are_enough():
    ModelConfig(embed_dim=64, text_cfg=TextTowerConfig(layers=2))
    ModelConfig(open_clip="RN50", init_logit_bias=-10.0)
    ModelConfig(multiway=MultiwayConfig(layers=2), init_logit_scale=10.0)
