"""Contrastive training steps over micro-batches, whose samples all contrast with each other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.losses.bilingual import Bank, BilingualLoss, BilingualOutput

Part = TypeVar("Part")
Part_contra = TypeVar("Part_contra", contravariant=True)

Accumulation = Literal["exact", "one_pass"]


@runtime_checkable
class EncodedPart(Protocol):
    """What an encoder gives for a micro-batch."""

    @property
    def image(self) -> Tensor | None:
        """Unit vectors of the pictures; None where they were not asked for."""

    @property
    def text(self) -> Mapping[str, Tensor]:
        """Unit vectors of the captions by language; empty where they were not asked for."""

    @property
    def sent(self) -> Any:
        """What the encoder was given to call with the texts has returned, if anything."""

    @property
    def logit_scale(self) -> Tensor:
        """The inverse temperature."""

    @property
    def logit_bias(self) -> Tensor | None:
        """Added to every scaled similarity; None for a softmax."""


@runtime_checkable
class Encoder(Protocol[Part_contra]):
    """Encodes a micro-batch, or one side of it."""

    def __call__(
        self,
        part: Part_contra,
        *,
        images: bool = True,
        texts: bool = True,
        on_texts: Callable[[Mapping[str, Tensor]], Any] | None = None,
    ) -> EncodedPart:
        """Encode what is asked for; call `on_texts` with the text features once they are there."""


class CachedContrast(Generic[Part]):
    """The forward and backward passes of one step over K micro-batches.

    `exact` (GradCache: Gao et al. 2021, section 3) gives the loss and gradients of the whole
    batch: it encodes all micro-batches, keeping the graph of the last alone, contrasts all
    features in one exchange, and encodes the other K - 1 again to differentiate them, with the
    same random numbers. With dropout each sample sees the same mask both times; batch norm
    normalises within micro-batches, and its running statistics see each once.

    `one_pass` encodes each micro-batch once: it contrasts with itself and with the features of
    those before it, which are candidates without a gradient (how we read M2-Encoder's grouped
    aggregation with batch accumulation, Guo et al. 2024). It is cheaper, and biased: early
    micro-batches see fewer candidates, and no sample gets a gradient as an earlier one's negative.

    With one micro-batch both are the plain step, whose texts travel behind the image tower.

    Args:
        loss: The loss; every rank runs the same steps.
        model: Whose buffers the second encoding must leave alone.
        mode: `exact` or `one_pass`.
        backward: Differentiates a loss, scaling it where the precision asks for that.
        no_sync: A context in which backward passes leave gradients unaveraged over ranks.

    Raises:
        ConfigError: `one_pass` for ranks that bring different numbers of samples.
    """

    def __init__(
        self,
        loss: BilingualLoss,
        model: nn.Module,
        *,
        mode: Accumulation = "exact",
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if mode == "one_pass" and not loss.exchange.plan.even:
            raise ConfigError(
                "accumulation is one_pass and the loss plan's even False; expected even=True, "
                "for every rank must weigh a micro-batch alike"
            )
        self.loss, self.model, self.mode = loss, model, mode
        self.backward, self.no_sync = backward, no_sync

    def step(
        self,
        encode: Encoder[Part],
        parts: Sequence[Part],
        image_ids: Sequence[Int64[Tensor, " _"]],
        caption_ids: Sequence[Mapping[str, Int64[Tensor, " _"]]],
    ) -> BilingualOutput:
        """Add the gradients of one step to the model's parameters.

        Args:
            encode: Runs the model.
            parts: The micro-batches of this rank; as many on every rank.
            image_ids: Of each, as the loss takes them.
            caption_ids: Of each, as the loss takes them.

        Returns:
            The loss, detached; in mode `one_pass` the terms are those of the last micro-batch.
        """
        if len(parts) == 1:
            encoded = encode(parts[0], on_texts=self.loss.send_texts)
            return self._contrast(encoded, encoded.sent, image_ids[0], caption_ids[0])
        if self.mode == "one_pass":
            return self._one_pass(encode, parts, image_ids, caption_ids)
        return self._exact(encode, parts, image_ids, caption_ids)

    def _contrast(
        self,
        encoded: EncodedPart,
        texts: Any,
        image_ids: Tensor,
        caption_ids: Mapping[str, Tensor],
        bank: Bank | None = None,
        weight: float = 1.0,
    ) -> BilingualOutput:
        """Compute the loss and differentiate it."""
        assert encoded.image is not None
        output = self.loss(
            encoded.image, texts, encoded.logit_scale, image_ids, caption_ids,
            encoded.logit_bias, bank,
        )  # fmt: skip
        self.backward(output.loss * weight)
        return BilingualOutput(output.loss.detach(), output.terms)

    def _one_pass(
        self,
        encode: Encoder[Part],
        parts: Sequence[Part],
        image_ids: Sequence[Tensor],
        caption_ids: Sequence[Mapping[str, Tensor]],
    ) -> BilingualOutput:
        bank: Bank = {}
        total = torch.zeros((), device=image_ids[0].device)
        samples = sum(map(len, image_ids))
        for k, part in enumerate(parts):
            weight = len(image_ids[k]) / samples
            with self.no_sync() if k < len(parts) - 1 else nullcontext():
                encoded = encode(part, on_texts=self.loss.send_texts)
                output = self._contrast(
                    encoded, encoded.sent, image_ids[k], caption_ids[k], bank, weight
                )
            total = total + weight * output.loss
        return BilingualOutput(total, output.terms)

    def _exact(
        self,
        encode: Encoder[Part],
        parts: Sequence[Part],
        image_ids: Sequence[Tensor],
        caption_ids: Sequence[Mapping[str, Tensor]],
    ) -> BilingualOutput:
        encoded, states = self._encode_all(encode, parts)
        leaves = _Leaves(encoded)
        ids = {name: torch.cat([each[name] for each in caption_ids]) for name in caption_ids[0]}
        output = self._contrast(leaves, leaves.text, torch.cat(list(image_ids)), ids)
        gradients = leaves.gradients([len(each) for each in image_ids])
        after = _RandomState(image_ids[0].device)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        with self.no_sync():
            gradients[-1].push(encoded[-1])
        del encoded
        for k, part in enumerate(parts[:-1]):
            states[k].restore()
            is_last = k == len(parts) - 2
            # The averaging over ranks begins with a backward pass that reaches every parameter.
            with nullcontext() if is_last else self.no_sync():
                again = encode(
                    part, images=gradients[k].image is not None, texts=bool(gradients[k].text)
                )
                gradients[k].push(again, leaves if is_last else None)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        after.restore()
        return output

    def _encode_all(
        self, encode: Encoder[Part], parts: Sequence[Part]
    ) -> tuple[list[EncodedPart], list["_RandomState"]]:
        """Encode every micro-batch, the last one with its graph."""
        encoded, states = [], []
        device = next(self.model.parameters()).device
        with self.no_sync():
            for k, part in enumerate(parts):
                states.append(_RandomState(device))
                with torch.set_grad_enabled(k == len(parts) - 1):
                    encoded.append(encode(part))
        return encoded, states


class _Leaves:
    """The features of all micro-batches as tensors of their own, whose gradients are collected."""

    sent = None

    def __init__(self, encoded: Sequence[EncodedPart]) -> None:
        last = encoded[-1]
        images = [each.image for each in encoded if each.image is not None]
        self.image: Tensor | None = _leaf(images)
        self.text = {name: _leaf([each.text[name] for each in encoded]) for name in last.text}
        self.logit_scale = _leaf([last.logit_scale])
        self.logit_bias = None if last.logit_bias is None else _leaf([last.logit_bias])

    def gradients(self, sizes: Sequence[int]) -> list["_Gradients"]:
        """Return the gradients of each micro-batch's features."""
        text = {name: _split(leaf.grad, sizes) for name, leaf in self.text.items()}
        image = _split(None if self.image is None else self.image.grad, sizes)
        return [
            _Gradients(image[k], {name: parts[k] for name, parts in text.items()})
            for k in range(len(sizes))
        ]


def _split(gradient: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if gradient is None else torch.split(gradient, list(sizes))


def _leaf(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors of micro-batches; only the last shows whether they need a gradient."""
    joined = torch.cat(list(tensors)) if tensors[0].ndim else tensors[0]
    return joined.detach().requires_grad_(tensors[-1].requires_grad)


class _Gradients:
    """Gradients of the features of one micro-batch; None where a tower needs none."""

    def __init__(self, image: Tensor | None, text: Mapping[str, Tensor | None]) -> None:
        self.image = image
        self.text = {name: each for name, each in text.items() if each is not None}

    def push(self, encoded: EncodedPart, scalars: _Leaves | None = None) -> None:
        """Differentiate the encoder, with the scale and bias where their gradients are given."""
        pairs = [(encoded.text[name], gradient) for name, gradient in self.text.items()]
        if encoded.image is not None and self.image is not None:
            pairs.append((encoded.image, self.image))
        if scalars is not None:
            for own, leaf in (
                (encoded.logit_scale, scalars.logit_scale),
                (encoded.logit_bias, scalars.logit_bias),
            ):
                if own is not None and leaf is not None and leaf.grad is not None:
                    pairs.append((own, leaf.grad))
        torch.autograd.backward([each for each, _ in pairs], [gradient for _, gradient in pairs])


class _RandomState:
    """The states of the random number generators that a model may use."""

    def __init__(self, device: torch.device) -> None:
        self.host = torch.get_rng_state()
        self.device = None if device.type == "cpu" else torch.get_device_module(device)
        self.device_state = None if self.device is None else self.device.get_rng_state()

    def restore(self) -> None:
        """Bring the generators back to where they were."""
        torch.set_rng_state(self.host)
        if self.device is not None:
            self.device.set_rng_state(self.device_state)
