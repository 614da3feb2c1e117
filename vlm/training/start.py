"""What a run starts from: a new model of random weights, or that of a bundle."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from vlm.bundle import load_bundle
from vlm.errors import ConfigError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.models.build import build_from_config, encoder_model_cfg, image_size
from vlm.models.encoder import Encoder
from vlm.text.tokenizer import Tokenizer, load_tokenizer
from vlm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model before its first step, and what it reads by."""

    encoder: Encoder
    tokenizer: Tokenizer
    model_cfg: Mapping[str, Any]
    """The model's description, from which `build_encoder` builds it."""
    preprocess: PreprocessConfig
    image_size: int
    """Side of the model's images, in pixels."""
    languages: tuple[str, ...] = ()
    """Languages that the model has been trained in already."""
    first_new_id: int | None = None
    """The first id of a grown vocabulary whose row has not been trained yet."""

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """open_clip's description of the image transform."""
        return preprocess_cfg(self.preprocess, self.image_size)


def build_start(config: TrainConfig) -> Start:
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


def _from_config(config: TrainConfig) -> Start:
    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(config.seed)
    model_cfg = encoder_model_cfg(config.model, tokenizer)
    return Start(
        encoder=build_from_config(config.model, tokenizer),
        tokenizer=tokenizer,
        model_cfg=model_cfg,
        preprocess=config.preprocess,
        image_size=image_size(model_cfg),
    )


def _from_bundle(config: TrainConfig) -> Start:
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
    size = bundle.preprocess_cfg["size"]
    known = {field.name for field in fields(PreprocessConfig)}
    settings = {name: value for name, value in bundle.preprocess_cfg.items() if name in known}
    return Start(
        encoder=bundle.model,
        tokenizer=bundle.tokenizer,
        model_cfg=bundle.model_cfg,
        preprocess=PreprocessConfig(
            **settings | {name: tuple(settings[name]) for name in ("mean", "std")}
        ),
        image_size=size if isinstance(size, int) else size[0],
        languages=bundle.languages,
        first_new_id=bundle.first_new_id,
    )
