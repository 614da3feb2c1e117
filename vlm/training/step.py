"""Contrastive training steps over micro-batches, whose samples all contrast with each other."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.losses.bilingual import Bank, BilingualLoss, BilingualOutput
from vlm.losses.contrastive import ContrastiveOutput

Part = TypeVar("Part")
Part_contra = TypeVar("Part_contra", contravariant=True)

Accumulation = Literal["exact", "one_pass"]

_Pairs = list[tuple[Tensor, Tensor]]
"""What is differentiated, with the gradient that reaches it."""


@runtime_checkable
class Head(Protocol):
    """Features of a micro-batch in one space, which contrast with each other."""

    @property
    def image(self) -> Tensor | None:
        """Unit vectors of the images; None where they were not asked for."""

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
class EncodedPart(Protocol):
    """What an encoder gives for a micro-batch."""

    @property
    def heads(self) -> Mapping[str, Head]:
        """One or more heads by name; the first is the model's own."""

    @property
    def others(self) -> Mapping[str, Tensor]:
        """Losses of other kinds, means over the micro-batch; none where no graph is kept."""


class StepOutput(NamedTuple):
    """What one step measured; nothing in it has a graph."""

    loss: Tensor
    """The weighted mean of the heads' losses, and the weighted sum of the others."""
    parts: dict[str, Tensor]
    """The loss of each head and each of the others, before weighting."""
    terms: dict[str, ContrastiveOutput]
    """The contrastive terms of the first head."""


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
        loss: The loss of a head; every rank runs the same steps.
        model: Whose buffers the second encoding must leave alone.
        mode: `exact` or `one_pass`.
        weights: Of heads and other losses by name; 1 where it is not named.
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
        weights: Mapping[str, float] | None = None,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if mode == "one_pass" and not loss.exchange.plan.even:
            raise ConfigError(
                "accumulation is one_pass and the loss plan's even False; expected even=True, "
                "for every rank must weigh a micro-batch alike"
            )
        self.loss, self.model, self.mode = loss, model, mode
        self.weights = dict(weights or {})
        self.backward, self.no_sync = backward, no_sync

    def step(
        self,
        encode: Encoder[Part],
        parts: Sequence[Part],
        image_ids: Sequence[Int64[Tensor, " _"]],
        caption_ids: Sequence[Mapping[str, Int64[Tensor, " _"]]],
    ) -> StepOutput:
        """Add the gradients of one step to the model's parameters.

        Args:
            encode: Runs the model.
            parts: The micro-batches of this rank; as many on every rank.
            image_ids: Of each, as the loss takes them.
            caption_ids: Of each, as the loss takes them.

        Returns:
            The losses; in mode `one_pass` the terms are those of the last micro-batch.
        """
        if len(parts) == 1:
            encoded = encode(parts[0], on_texts=self.loss.send_texts)
            outputs = self._contrast(encoded, image_ids[0], caption_ids[0])
            self.backward(self._mean(outputs) + self._sum(encoded.others))
            return self._output(outputs, encoded.others)
        if self.mode == "one_pass":
            return self._one_pass(encode, parts, image_ids, caption_ids)
        return self._exact(encode, parts, image_ids, caption_ids)

    def _contrast(
        self,
        encoded: EncodedPart,
        image_ids: Tensor,
        caption_ids: Mapping[str, Tensor],
        banks: Mapping[str, Bank] | None = None,
    ) -> dict[str, BilingualOutput]:
        """Compute the loss of every head."""
        outputs = {}
        for name, head in encoded.heads.items():
            assert head.image is not None
            outputs[name] = self.loss(
                head.image, head.sent or self.loss.send_texts(head.text), head.logit_scale,
                image_ids, caption_ids, head.logit_bias, None if banks is None else banks[name],
            )  # fmt: skip
        return outputs

    def _mean(self, outputs: Mapping[str, BilingualOutput]) -> Tensor:
        weights = {name: self.weights.get(name, 1.0) for name in outputs}
        total = sum(weights.values())
        return torch.stack([weights[name] / total * outputs[name].loss for name in outputs]).sum()

    def _sum(self, others: Mapping[str, Tensor]) -> Tensor | float:
        return sum((self.weights.get(name, 1.0) * loss for name, loss in others.items()), 0.0)

    def _output(
        self, outputs: Mapping[str, BilingualOutput], others: Mapping[str, Tensor]
    ) -> StepOutput:
        parts = {name: output.loss.detach() for name, output in outputs.items()}
        others = {name: loss.detach() for name, loss in others.items()}
        loss = self._mean(outputs).detach() + self._sum(others)
        return StepOutput(loss, parts | others, next(iter(outputs.values())).terms)

    def _one_pass(
        self,
        encode: Encoder[Part],
        parts: Sequence[Part],
        image_ids: Sequence[Tensor],
        caption_ids: Sequence[Mapping[str, Tensor]],
    ) -> StepOutput:
        banks: dict[str, Bank] = defaultdict(dict)
        steps = []
        shares = [len(ids) / sum(map(len, image_ids)) for ids in image_ids]
        for k, part in enumerate(parts):
            with self.no_sync() if k < len(parts) - 1 else nullcontext():
                encoded = encode(part, on_texts=self.loss.send_texts)
                outputs = self._contrast(encoded, image_ids[k], caption_ids[k], banks)
                self.backward(shares[k] * (self._mean(outputs) + self._sum(encoded.others)))
            steps.append(self._output(outputs, encoded.others))
        return StepOutput(
            _weighted([each.loss for each in steps], shares),
            {
                name: _weighted([each.parts[name] for each in steps], shares)
                for name in steps[0].parts
            },
            steps[-1].terms,
        )

    def _exact(
        self,
        encode: Encoder[Part],
        parts: Sequence[Part],
        image_ids: Sequence[Tensor],
        caption_ids: Sequence[Mapping[str, Tensor]],
    ) -> StepOutput:
        encoded, states = self._encode_all(encode, parts)
        leaves = _Leaves(encoded)
        ids = {name: torch.cat([each[name] for each in caption_ids]) for name in caption_ids[0]}
        outputs = self._contrast(leaves, torch.cat(list(image_ids)), ids)
        self.backward(self._mean(outputs))
        sizes = [len(each) for each in image_ids]
        gradients = leaves.gradients(sizes)
        after = _RandomState(image_ids[0].device)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        others = [encoded[-1].others] * len(parts)
        with self.no_sync():
            gradients[-1].push(encoded[-1], self._gradients_of(others[-1], sizes[-1] / sum(sizes)))
        del encoded
        for k, part in enumerate(parts[:-1]):
            states[k].restore()
            is_last = k == len(parts) - 2
            # The averaging over ranks begins with a backward pass that reaches every parameter.
            with nullcontext() if is_last else self.no_sync():
                both = bool(others[-1])  # other losses need both sides
                again = encode(
                    part, images=both or gradients[k].asks_images,
                    texts=both or gradients[k].asks_texts,
                )  # fmt: skip
                others[k] = again.others
                of_others = self._gradients_of(again.others, sizes[k] / sum(sizes))
                gradients[k].push(again, of_others, leaves if is_last else None)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        after.restore()
        shares = [size / sum(sizes) for size in sizes]
        means = {
            name: _weighted([each[name].detach() for each in others], shares) for name in others[0]
        }
        return self._output(outputs, means)

    def _gradients_of(self, others: Mapping[str, Tensor], share: float) -> _Pairs:
        """Return the other losses that have a graph, each with its gradient."""
        return [
            (loss, torch.full_like(loss, share * self.weights.get(name, 1.0)))
            for name, loss in others.items()
            if loss.requires_grad
        ]

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


def _weighted(losses: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * loss for share, loss in zip(shares, losses, strict=True)]).sum()


class _Leaf:
    """The features of a head of all micro-batches as tensors whose gradients are collected."""

    sent = None

    def __init__(self, heads: Sequence[Head]) -> None:
        last = heads[-1]
        images = [each.image for each in heads if each.image is not None]
        self.image: Tensor | None = _leaf(images)
        self.text = {name: _leaf([each.text[name] for each in heads]) for name in last.text}
        self.logit_scale = _leaf([last.logit_scale])
        self.logit_bias = None if last.logit_bias is None else _leaf([last.logit_bias])


class _Leaves:
    """The heads of all micro-batches joined."""

    others: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, encoded: Sequence[EncodedPart]) -> None:
        self.heads = {
            name: _Leaf([each.heads[name] for each in encoded]) for name in encoded[-1].heads
        }

    def gradients(self, sizes: Sequence[int]) -> list["_Gradients"]:
        """Return the gradients of each micro-batch's features."""
        images, texts = {}, {}
        for name, leaf in self.heads.items():
            images[name] = _split(None if leaf.image is None else leaf.image.grad, sizes)
            for language, text in leaf.text.items():
                texts[name, language] = _split(text.grad, sizes)
        return [
            _Gradients(
                {name: each[k] for name, each in images.items()},
                {name: each[k] for name, each in texts.items()},
            )
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

    def __init__(
        self,
        images: Mapping[str, Tensor | None],
        texts: Mapping[tuple[str, str], Tensor | None],
    ) -> None:
        self.images = {name: each for name, each in images.items() if each is not None}
        self.texts = {name: each for name, each in texts.items() if each is not None}

    @property
    def asks_images(self) -> bool:
        """Whether the images have to be encoded once more."""
        return bool(self.images)

    @property
    def asks_texts(self) -> bool:
        """Whether the texts have to be encoded once more."""
        return bool(self.texts)

    def push(
        self,
        encoded: EncodedPart,
        of_others: _Pairs,
        scalars: _Leaves | None = None,
    ) -> None:
        """Differentiate the encoder, with the scales and biases where their gradients are given."""
        pairs = list(of_others)
        pairs += [(encoded.heads[name].text[language], gradient)
                  for (name, language), gradient in self.texts.items()]  # fmt: skip
        for name, gradient in self.images.items():
            image = encoded.heads[name].image
            if image is not None:
                pairs.append((image, gradient))
        if scalars is not None:
            pairs += _scalar_gradients(encoded.heads, scalars.heads)
        torch.autograd.backward([each for each, _ in pairs], [gradient for _, gradient in pairs])


def _scalar_gradients(
    heads: Mapping[str, Head], leaves: Mapping[str, _Leaf]
) -> Iterator[tuple[Tensor, Tensor]]:
    for name, head in heads.items():
        leaf = leaves[name]
        for own, joined in (
            (head.logit_scale, leaf.logit_scale),
            (head.logit_bias, leaf.logit_bias),
        ):
            if own is not None and joined is not None and joined.grad is not None:
                yield own, joined.grad


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
