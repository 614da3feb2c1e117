"""A frozen teacher of a run: what it makes of a batch, and how far the run's features are off."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.batches.batch import Batch
from vlm.batches.examples import caption_names
from vlm.bundle import Bundle, load_bundle
from vlm.distributed.groups import RankGroup
from vlm.errors import CheckpointError, ConfigError
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.distillation import (
    Side,
    feature_distance,
    logit_divergence,
    structure_divergence,
)
from vlm.losses.plan import FEATURES, LOGITS, STRUCTURE, DistillationConfig
from vlm.models.encoder import Encoder
from vlm.models.masked import by_sample
from vlm.models.pretraining import Features
from vlm.training.config import TrainConfig
from vlm.training.precision import Precision


class Targets(NamedTuple):
    """What a teacher makes of a batch: float32 unit vectors without gradients."""

    image: Float[Tensor, "batch dim"]
    text: dict[str, Float[Tensor, "batch dim"]]
    """By the name of captions, a row for each sample; zeros where there is no target."""
    there: dict[str, Bool[Tensor, " batch"]]
    """By the name of captions, whether a sample has a caption and a target for it."""


@dataclass(frozen=True)
class Distillation:
    """The losses towards a teacher, over all samples that are contrasted with each other."""

    config: DistillationConfig
    encoder: Encoder
    """The teacher's; where the run computes, and frozen."""
    languages: Mapping[str, str]
    """The language of each name under which batches have captions."""
    known: frozenset[str]
    """The languages that the teacher reads."""
    group: RankGroup
    """The ranks whose samples are compared."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """Makes a context in the arithmetic of the run's towers."""
    fingerprint: str
    """Of the teacher's bundle."""

    @torch.no_grad()
    def targets(self, part: Batch) -> Targets:
        """Encode a micro-batch's images and the captions that the teacher reads."""
        samples = len(part.image_ids)
        with self.autocast():
            image = self.encoder.encode_image(part.images)
            read = {
                name: self.encoder.encode_text(tokens)
                for name, tokens in part.texts.items()
                if self.languages[name] in self.known
            }
        has = {
            name: by_sample(torch.ones_like(rows, dtype=torch.bool), rows, samples)
            for name, rows in part.text_rows.items()
        }
        text = {
            name: by_sample(features, part.text_rows[name], samples)
            for name, features in read.items()
        }
        there = {name: has[name] for name in read}
        if self.config.across_languages:
            main = [name for name in read if name == self.languages[name]]
            others = [name for name in part.texts if name not in read]
            across, any_main = torch.zeros_like(image), torch.zeros_like(part.image_ids).bool()
            for name in reversed(main):  # the first that is there counts
                across = torch.where(has[name][:, None], text[name], across)
                any_main = any_main | has[name]
            text |= dict.fromkeys(others, across)
            there |= {name: has[name] & any_main for name in others}
        return Targets(image, text, there)

    def losses(self, head: Features, targets: Sequence[Targets]) -> dict[str, Float[Tensor, ""]]:
        """Return this rank's share of each loss that is on, of its whole batch.

        Args:
            head: The features of all micro-batches; a caption that is absent has a row of zeros.
            targets: Of each micro-batch.
        """
        assert head.image is not None
        image = torch.cat([each.image for each in targets])
        everyone = torch.ones(len(image), dtype=torch.bool, device=image.device)
        images = Side(head.image, image, everyone)
        texts = [
            Side(
                head.text[name],
                torch.cat([each.text[name] for each in targets]),
                torch.cat([each.there[name] for each in targets]),
            )
            for name in targets[0].text
        ]
        scale = self.encoder.logit_scale.detach()
        losses = {
            FEATURES: lambda: feature_distance([images, *texts], self.group),
            STRUCTURE: lambda: structure_divergence([images, *texts], scale, self.group),
            LOGITS: lambda: logit_divergence(images, texts, head.logit_scale, scale, self.group),
        }
        return {name: losses[name]() for name in self.config.weights}

    def describe(self) -> str:
        """Say what has targets."""
        names = [name for name in self.languages if name == self.languages[name]]
        known = [name for name in names if name in self.known]
        others = [name for name in names if name not in self.known]
        captions = f", captions in {', '.join(known)}" if known else ""
        if known and others and self.config.across_languages:
            captions += f", those in {', '.join(others)} by the former of the same sample"
        return f"{self.fingerprint[:12]}, for images{captions}"

    def state_dict(self) -> dict[str, Any]:
        """Return what the teacher is known by; a checkpoint does not keep its weights."""
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with what it was; a `CheckpointError` if the teacher has changed."""
        if state["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"the teacher of the run has changed: its fingerprint is {self.fingerprint[:12]}; "
                f"expected {state['fingerprint'][:12]}, the bundle that the run began with"
            )


def load_teacher(config: TrainConfig, start: Bundle) -> Bundle | None:
    """Read the teacher of a run, frozen; None where it has none.

    Raises:
        VlmError: the teacher does not fit the run's model, images or captions.
    """
    plan, languages = config.objectives.distillation, config.captions.languages
    path = plan.teacher or config.start_from
    if not plan.weights:
        return None
    if path is None:
        raise ConfigError(
            "objectives.distillation has a weight and no teacher; expected its teacher, or "
            "start_from"
        )
    teacher = load_bundle(path)
    check_same_images(teacher, start.preprocess_cfg)
    if teacher.tokenizer.fingerprint != start.tokenizer.fingerprint:
        raise ConfigError(
            f"the teacher {path} has another tokenizer than the run; expected the same, as a "
            "bundle has that `vlm grow` has grown to it"
        )
    ours, theirs = start.model.embed_dim, teacher.model.embed_dim
    if plan.feature_weight and ours != theirs:
        raise ConfigError(
            f"the teacher's features have {theirs} dimensions and the run's {ours}; expected the "
            "same, or a feature_weight of 0"
        )
    known = frozenset(plan.languages or teacher.languages)
    if plan.logit_weight and not known.intersection(languages):
        raise ConfigError(
            f"logit_weight is {plan.logit_weight}, but the teacher reads "
            f"{', '.join(sorted(known)) or 'no language'} and captions are in "
            f"{', '.join(languages)}; expected one that it reads, or its languages"
        )
    teacher.model.requires_grad_(False)
    return teacher


def build_distillation(
    config: TrainConfig,
    start: Bundle,
    loss: BilingualLoss,
    precision: Precision,
    device: torch.device,
) -> Distillation | None:
    """Read the teacher of a run, and return the losses towards it; None where it has none."""
    teacher = load_teacher(config, start)
    if teacher is None:
        return None
    plan = config.objectives.distillation
    return Distillation(
        config=plan,
        encoder=teacher.model.to(device),
        languages=caption_names(config.captions.languages),
        known=frozenset(plan.languages or teacher.languages),
        group=loss.exchange.mesh.group,
        autocast=precision.autocast,
        fingerprint=teacher.fingerprint,
    )


def check_same_images(teacher: Bundle, preprocess_cfg: Mapping[str, Any]) -> None:
    """Refuse a teacher that was trained on images of another size or normalisation."""
    wrong = [
        f"{name} {teacher.preprocess_cfg[name]} for {preprocess_cfg[name]}"
        for name in ("size", "mean", "std")
        if np.any(np.not_equal(teacher.preprocess_cfg[name], preprocess_cfg[name]))
    ]
    if wrong:
        raise ConfigError(
            f"the teacher's images differ from the run's: {', '.join(wrong)}; expected a teacher "
            "with the same size, mean and std"
        )
