"""The model of a training run: an encoder, and what is trained with it and then left out."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.batch_norm import keep_locked_statistics
from vlm.models.encoder import MAIN, UNIMODAL, Encoder
from vlm.models.masked import Hidden, MaskedModelling
from vlm.models.text_thread import TextThread
from vlm.text.tokenizer import TokenBatch


class Features(NamedTuple):
    """A batch in the space of one head."""

    image: Float[Tensor, "batch dim"] | None
    """Unit vectors, float32; None where no images were given."""
    text: dict[str, Float[Tensor, "texts dim"]]
    """Unit vectors of the texts given by language, float32."""
    logit_scale: Float[Tensor, ""]
    """The inverse temperature, of a softmax at most `MAX_LOGIT_SCALE`."""
    logit_bias: Float[Tensor, ""] | None = None
    """The bias of a sigmoid loss's logits, where the model has one."""


class Encoded(NamedTuple):
    """What a training step needs of a batch."""

    heads: dict[str, Features]
    """By head, the model's own first."""
    others: dict[str, Float[Tensor, ""]]
    """Losses of masked modelling; empty without a graph."""


OnTexts = Callable[[str, Mapping[str, Tensor]], None]
"""Takes a head's name and its text features by language, before the images are encoded."""


class LanguageEmbeddings(nn.Module):
    """A vector for each language, added to the text tower's output in training only.

    LangSAMP (Liu et al. 2024, section 3): what distinguishes languages need not be in the tower's
    own features, which become more alike across languages. There a language and a script are two
    vectors; Chinese and English differ in both at once, so that here one vector holds their sum.
    `languages` has the language of each name under which captions come.
    """

    def __init__(self, languages: Mapping[str, str], width: int) -> None:
        super().__init__()
        order = {language: row for row, language in enumerate(dict.fromkeys(languages.values()))}
        self.rows = {name: order[language] for name, language in languages.items()}
        self.vectors = nn.Parameter(torch.zeros(len(order), width))

    def forward(
        self, features: Float[Tensor, "batch width"], name: str
    ) -> Float[Tensor, "batch width"]:
        """Add the language's vector to features that are not normalised yet."""
        return features + self.vectors[self.rows[name]]


class PretrainingModel(nn.Module):
    """An encoder with the parts that only training has; every rank's forward pass is one call.

    Args:
        encoder: The model that a bundle keeps.
        masked: Masked modelling of words and patches, if any.
        languages: Vectors that are added to the texts' features by language, if any.
        matryoshka: Widths below `embed_dim`: the first N dimensions of the features are a head of
            their own (Kusupati et al. 2022, "Matryoshka Representation Learning", section 3).
        unimodal: Whether a second head that the encoder has is trained.
        teacher: Gives the targets of hidden patches; frozen, and no part of this module.
        text_thread: Runs the text tower next to the image tower.

    Raises:
        ConfigError: a width is not in [1, embed_dim), or named twice, or masked modelling, which
            reads both towers' states, comes with a thread for texts.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        masked: MaskedModelling | None = None,
        languages: LanguageEmbeddings | None = None,
        matryoshka: Sequence[int] = (),
        unimodal: bool = True,
        teacher: Callable[[Tensor], Tensor] | None = None,
        text_thread: TextThread | None = None,
    ) -> None:
        super().__init__()
        wrong = [width for width in matryoshka if not 0 < width < encoder.embed_dim]
        if wrong:
            raise ConfigError(
                f"matryoshka has the width {wrong[0]}; expected 1 to {encoder.embed_dim - 1}, "
                "below the dimension of the features"
            )
        if len(set(matryoshka)) < len(matryoshka):
            raise ConfigError(f"matryoshka is {list(matryoshka)}; expected each width once")
        if masked is not None and text_thread is not None:
            raise ConfigError(
                "parallel_towers is true, but masked modelling reads the states of both towers; "
                "expected false, or no cmlm_weight and cmim_weight"
            )
        self.encoder = encoder
        self.masked = masked
        self.languages = languages
        self.matryoshka = tuple(matryoshka)
        self.unimodal = unimodal
        self.teacher = teacher
        self.text_thread = text_thread
        hides_patches = masked is not None and masked.hides_patches
        for parameter in encoder.untrained_parameters(unimodal=unimodal, patches=hides_patches):
            # Wrappers that average gradients over ranks wait for every parameter that wants one.
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "PretrainingModel":
        """Set the mode of all modules; batch norms of locked towers keep their statistics."""
        super().train(mode)
        keep_locked_statistics(self)
        return self

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"] | None,
        texts: Mapping[str, TokenBatch],
        hidden: Hidden | None = None,
        on_texts: OnTexts | None = None,
    ) -> Encoded:
        """Encode a batch's captions in every language, then its normalised images, if any.

        The losses of what masked modelling hides are computed where both are given and gradients
        are enabled. `on_texts` is called with each head's text features before the images are
        encoded, so that they can travel to other ranks meanwhile.
        """
        encoder = self.encoder
        masked = self.masked if images is not None and texts else None
        if masked is None or hidden is None:  # the features alone are quicker than the states
            image, text = self._features(images, texts, on_texts)
            return Encoded(self._joined(image, text), {})
        assert images is not None
        text_states = {name: encoder.text_states(tokens) for name, tokens in texts.items()}
        text = {name: self._heads(each.features, name) for name, each in text_states.items()}
        self._announce(text, on_texts)
        image_states = encoder.image_states(images)
        heads = self._joined(self._heads(image_states.features), text)
        if not torch.is_grad_enabled():
            # The states were computed even so: the other way to the same features would draw other
            # random numbers than the pass that is differentiated.
            return Encoded(heads, {})
        target = None if self.teacher is None else self.teacher(images)
        others = masked(encoder, images, image_states, texts, text_states, hidden, target)
        return Encoded(heads, others)

    def _features(
        self, images: Tensor | None, texts: Mapping[str, TokenBatch], on_texts: OnTexts | None
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Mapping[str, Tensor]]]:
        """Return the heads of images, and those of texts by name."""

        def of_texts() -> dict[str, dict[str, Tensor]]:
            return {
                name: self._heads(self.encoder.text_features(tokens), name)
                for name, tokens in texts.items()
            }

        def of_images() -> dict[str, Tensor]:
            return {} if images is None else self._heads(self.encoder.image_features(images))

        if self.text_thread is not None and images is not None and texts:
            text, image = self.text_thread.run(of_texts, of_images)
            self._announce(text, on_texts)
            return image, text
        text = of_texts()
        self._announce(text, on_texts)
        return of_images(), text

    def _announce(self, text: Mapping[str, Mapping[str, Tensor]], on_texts: OnTexts | None) -> None:
        if on_texts is not None:
            for head in self._head_names():
                on_texts(head, {name: features[head] for name, features in text.items()})

    def _joined(
        self, image: Mapping[str, Tensor], text: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, Features]:
        scales, bias = self.encoder.logit_scales, self.encoder.logit_bias
        return {
            head: Features(
                image=image.get(head),
                text={name: features[head] for name, features in text.items()},
                logit_scale=scales[UNIMODAL if head == UNIMODAL else MAIN],
                # Not the parameter itself: wrappers of the module may not see it leave.
                logit_bias=None if bias is None else bias * 1,
            )
            for head in self._head_names()
        }

    def _head_names(self) -> tuple[str, ...]:
        second = [UNIMODAL] if self.unimodal and UNIMODAL in self.encoder.logit_scales else []
        return (MAIN, *(f"{MAIN} {width}" for width in self.matryoshka), *second)

    def _heads(
        self, features: Mapping[str, Tensor], language: str | None = None
    ) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the unit vectors of every head of features that are not normalised yet."""
        main = features[MAIN]
        if language is not None and self.languages is not None:
            main = self.languages(main, language)
        heads = {MAIN: main} | {f"{MAIN} {width}": main[:, :width] for width in self.matryoshka}
        if UNIMODAL in self._head_names():
            heads[UNIMODAL] = features[UNIMODAL]
        return {name: F.normalize(each.float(), dim=-1) for name, each in heads.items()}
