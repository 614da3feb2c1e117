"""The bundles that a run leaves."""

from pathlib import Path

from vlm.bundle import Bundle, save_bundle
from vlm.distributed.sharding import whole_state
from vlm.models.build import build_encoder
from vlm.models.encoder import Encoder
from vlm.models.lora import without_lora
from vlm.training.adaptation import adapt
from vlm.training.config import TrainConfig


def leave_bundle(
    folder: Path, start: Bundle, config: TrainConfig, *, is_whole: bool, is_main: bool
) -> None:
    """Write the model that a run has trained; a collective operation.

    Args:
        folder: The bundle's.
        start: What the run started from; its model is the one that was trained.
        config: The run's.
        is_whole: Whether every rank has all of its weights.
        is_main: Whether this rank writes.
    """
    encoder = start.model if is_whole else _gathered(start, config, is_main=is_main)
    if not is_main or encoder is None:
        return
    save_bundle(
        folder,
        model=without_lora(encoder),
        model_cfg=start.model_cfg,
        preprocess_cfg=start.preprocess_cfg,
        tokenizer=start.tokenizer,
        languages=tuple(dict.fromkeys((*start.languages, *config.captions.languages))),
        truncate_dims=config.objectives.matryoshka,
    )


def _gathered(start: Bundle, config: TrainConfig, *, is_main: bool) -> Encoder | None:
    """Return a copy of the encoder with all of its weights, on the main process alone."""
    state = whole_state(start.model, keep=is_main)
    if not is_main:
        return None
    encoder = build_encoder(start.model_cfg)
    adapt(encoder, config.adapt)  # for its adapters, if any
    encoder.load_state_dict(state)
    return encoder
