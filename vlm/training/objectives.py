"""What a run trains next to the contrast of its features: masked modelling and further heads."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm.batches.collate import MaskPlan
from vlm.bundle import Bundle, load_bundle
from vlm.errors import ConfigError
from vlm.models.config import CMIM, CMLM, MaskedConfig
from vlm.models.encoder import UNIMODAL, Encoder
from vlm.models.masked import MaskedModelling
from vlm.models.pretraining import LanguageEmbeddings, PretrainingModel
from vlm.models.text_thread import TextThread
from vlm.training.config import ObjectivesConfig
from vlm.training.distillation import check_same_images


class Teacher:
    """A frozen model whose patch states hidden patches are to be recovered as.

    Raises:
        ConfigError: it was trained on images of another size or normalisation than the run's.
    """

    def __init__(self, bundle: Bundle, preprocess_cfg: Mapping[str, Any]) -> None:
        check_same_images(bundle, preprocess_cfg)
        self.model = bundle.model

    @torch.no_grad()
    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch patches states"]:
        """Return the states of images' patches."""
        return self.model.to(images.device).image_states(images).tokens


def build_pretraining_model(
    encoder: Encoder,
    config: ObjectivesConfig,
    *,
    languages: Mapping[str, str],
    preprocess_cfg: Mapping[str, Any],
    text_thread: TextThread | None = None,
) -> PretrainingModel:
    """Put the parts that only training has around an encoder.

    Args:
        encoder: The model.
        config: What is trained.
        languages: The language of each name under which batches have captions.
        preprocess_cfg: open_clip's description of the images.
        text_thread: Runs the text tower next to the image tower.

    Raises:
        VlmError: the parts do not fit the encoder, or the teacher is no bundle.
    """
    masked, teacher = None, None
    if config.masked.weights:
        if config.masked.teacher is not None and CMIM in config.masked.weights:
            teacher = Teacher(load_bundle(config.masked.teacher), preprocess_cfg)
            if teacher.model.grid_size != encoder.grid_size:
                theirs, ours = teacher.model.grid_size, encoder.grid_size
                raise ConfigError(
                    f"the teacher has {theirs[0]} x {theirs[1]} patches; expected the model's "
                    f"{ours[0]} x {ours[1]}"
                )
        size = preprocess_cfg["size"]
        masked = MaskedModelling(
            config.masked,
            encoder,
            image_size=size if isinstance(size, int) else tuple(size),
            teacher_width=None if teacher is None else teacher.model.image_width,
        )
    embeddings = LanguageEmbeddings(languages, encoder.embed_dim)
    return PretrainingModel(
        encoder,
        masked=masked,
        languages=embeddings if config.language_embeddings else None,
        matryoshka=config.matryoshka,
        unimodal=config.unimodal_weight > 0,
        teacher=teacher,
        text_thread=text_thread,
    )


def loss_weights(config: ObjectivesConfig) -> dict[str, float]:
    """Return the weight of each head and of each other loss by its name."""
    return {
        UNIMODAL: config.unimodal_weight,
        **config.masked.weights,
        **config.distillation.weights,
    }


def mask_plan(config: MaskedConfig, encoder: Encoder) -> MaskPlan:
    """Return what of each example the loader hides; a `ConfigError` if that is no patch."""
    rows, columns = encoder.grid_size if CMIM in config.weights else (1, 1)
    hidden = round(config.image_ratio * rows * columns)
    if CMIM in config.weights and not hidden:
        raise ConfigError(
            f"image_ratio {config.image_ratio} of {rows * columns} patches rounds to 0; "
            "expected a ratio that hides at least one"
        )
    return MaskPlan(
        text_ratio=config.text_ratio if CMLM in config.weights else 0.0,
        image_ratio=config.image_ratio if CMIM in config.weights else 0.0,
        grid=(rows, columns),
    )
