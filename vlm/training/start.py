"""What a run starts from: a bundle, read from a folder or made of random weights."""

from dataclasses import fields

import torch

from vlm.bundle import Bundle, load_bundle
from vlm.errors import ConfigError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import TrainingTransform, evaluation_transform, preprocess_cfg
from vlm.models.build import build_from_config, encoder_model_cfg, image_size
from vlm.text.tokenizer import load_tokenizer
from vlm.training.config import TrainConfig


def build_start(config: TrainConfig) -> Bundle:
    """Build the model of a configuration with weights by its seed, or read that of its bundle.

    Raises:
        VlmError: the model cannot be built, or the bundle not read.
        ConfigError: the configuration describes a model as well as naming a bundle, or asks for
            steps of new rows where there are none.
    """
    start = _from_config(config) if config.start_from is None else _from_bundle(config)
    if config.schedule.new_rows_steps and start.first_new_id is None:
        raise ConfigError(
            f"schedule.new_rows_steps is {config.schedule.new_rows_steps}, but the model has no "
            "new rows; expected start_from a bundle of `vlm grow` or `vlm convert --extend`"
        )
    return start


def training_transform(config: TrainConfig, start: Bundle) -> TrainingTransform:
    """Return the augmentation of a run around the image transform of what it starts from."""
    size = start.preprocess_cfg["size"]
    known = {field.name for field in fields(PreprocessConfig)}
    settings = {name: value for name, value in start.preprocess_cfg.items() if name in known}
    settings |= {name: tuple(settings[name]) for name in ("mean", "std")}
    side = size if isinstance(size, int) else size[0]
    return TrainingTransform(PreprocessConfig(**settings), config.augmentation, side)


def _from_config(config: TrainConfig) -> Bundle:
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(config.seed)
    model_cfg = encoder_model_cfg(config.model, tokenizer)
    described = preprocess_cfg(config.preprocess, image_size(model_cfg))
    return Bundle(
        model=build_from_config(config.model, tokenizer),
        tokenizer=tokenizer,
        transform=evaluation_transform(described),
        model_cfg=model_cfg,
        preprocess_cfg=described,
    )


def _from_bundle(config: TrainConfig) -> Bundle:
    assert config.start_from is not None
    plain = TrainConfig()
    described = [
        name
        for name in ("model", "tokenizer", "preprocess")
        if getattr(config, name) != getattr(plain, name)
    ]
    if described:
        raise ConfigError(
            f"start_from gives the model, tokenizer and image transform; expected no settings of "
            f"{', '.join(described)}"
        )
    bundle = load_bundle(config.start_from)
    torch.manual_seed(config.seed)
    return bundle
