"""What a run starts from: a model with weights by its seed, or that of a bundle."""

from pathlib import Path

import torch

from vlm.bundle import Bundle, load_bundle
from vlm.errors import ConfigError
from vlm.images.transforms import evaluation_transform, preprocess_cfg
from vlm.models.build import build_from_config, encoder_model_cfg, image_size
from vlm.text.tokenizer import load_tokenizer
from vlm.training.config import TrainConfig


def build_start(config: TrainConfig) -> Bundle:
    """Build the model of a configuration with weights by its seed, or read that of its bundle.

    Raises:
        VlmError: the model cannot be built, or the bundle not read.
        ConfigError: the configuration describes a model as well as naming a bundle, or a stage
            trains new rows where there are none.
    """
    if config.start_from is None:
        tokenizer = load_tokenizer(config.tokenizer)
        torch.manual_seed(config.seed)
        model_cfg = encoder_model_cfg(config.model, tokenizer)
        described = preprocess_cfg(config.preprocess, image_size(model_cfg))
        start = Bundle(
            model=build_from_config(config.model, tokenizer),
            tokenizer=tokenizer,
            transform=evaluation_transform(described),
            model_cfg=model_cfg,
            preprocess_cfg=described,
        )
    else:
        start = _from_bundle(config, config.start_from)
    if start.first_new_id is None and any(s.trained == "new_rows" for s in config.stages):
        raise ConfigError(
            "a stage trains new_rows, but the model has none; expected start_from a bundle of "
            "`vlm grow` or `vlm convert --extend`"
        )
    return start


def _from_bundle(config: TrainConfig, path: Path) -> Bundle:
    plain, names = TrainConfig(), ("model", "tokenizer", "preprocess")
    described = [name for name in names if getattr(config, name) != getattr(plain, name)]
    if described:
        raise ConfigError(
            f"start_from gives the model, tokenizer and image transform; expected no settings of "
            f"{', '.join(described)}"
        )
    bundle = load_bundle(path)
    torch.manual_seed(config.seed)
    return bundle
