"""One training step: forward and backward passes over micro-batches that contrast as one batch."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vlm.batches.batch import Batch
from vlm.errors import ConfigError
from vlm.losses.bilingual import Bank, BilingualLoss, BilingualOutput, SentTexts
from vlm.losses.contrastive import ContrastiveOutput
from vlm.models.masked import Hidden, by_sample
from vlm.models.pretraining import Encoded, Features, OnTexts
from vlm.text.caption_ids import NO_CAPTION
from vlm.training.distillation import Distillation, Targets


class StepOutput(NamedTuple):
    """What one step measured on this rank; nothing in it has a graph."""

    loss: Tensor
    """The weighted mean of the heads' losses, plus the weighted sum of the others."""
    parts: dict[str, Tensor]
    """The loss of each head and each of the others, before weighting."""
    terms: dict[str, ContrastiveOutput]
    """The contrastive terms of the first head."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured on this rank; reading the tensors waits for the device."""

    loss: Tensor
    parts: Mapping[str, Tensor]
    """What the loss is made of, by head and objective, where it has more than one part."""
    terms: Mapping[str, ContrastiveOutput]
    """The contrastive terms of the first head; of the last micro-batch alone in mode `one_pass`."""
    gradient_norm: Tensor
    """Of the averaged gradient, before clipping; the same on every rank."""
    tower_norms: Mapping[str, Tensor]
    """The same by tower, where the step is reported."""
    logit_scale: Tensor
    learning_rate: float


@dataclass(frozen=True)
class ContrastiveStep:
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

    With one micro-batch both are the plain step.

    Raises:
        ConfigError: `one_pass` with a loss that allows uneven batches.
    """

    model: nn.Module
    """A `PretrainingModel`, any other module that is called like one, or a wrapper of it (DDP)."""
    loss: BilingualLoss
    """The loss of a head; every rank runs the same steps."""
    mode: Literal["exact", "one_pass"] = "exact"
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of heads and other losses by name; 1 where it is not named."""
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    """Differentiates a scalar, and scales it where the precision needs that; `Accelerator.backward`
    for example. Every gradient of a parameter comes from here."""
    distillation: Distillation | None = None
    """Losses towards a frozen teacher, which sees every micro-batch once. In mode `exact` they are
    those of the whole batch, in mode `one_pass` the means of the micro-batches' own."""
    no_sync: Callable[[], AbstractContextManager[None]] | None = None
    """Makes a context whose backward passes leave gradients unaveraged; by default the model's."""
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes a context in which the model computes."""

    def __post_init__(self) -> None:
        if self.mode == "one_pass" and not self.loss.exchange.plan.even:
            raise ConfigError(
                "loss.accumulation one_pass needs loss.plan.even true: every rank must weight a "
                "micro-batch alike"
            )

    def __call__(self, parts: Sequence[Batch]) -> StepOutput:
        """Add the gradients of one step to the model's parameters.

        Every rank has the same number of micro-batches. In mode `one_pass` the terms returned are
        those of the last.
        """
        if self.mode == "exact" and len(parts) > 1:
            return self._exact(parts)
        return self._one_pass(parts)

    def _one_pass(self, parts: Sequence[Batch]) -> StepOutput:
        banks: dict[str, Bank] | None = defaultdict(dict) if len(parts) > 1 else None
        steps, ratios = [], _ratios(parts)
        sent: dict[str, SentTexts] = {}

        def send(head: str, texts: Mapping[str, Tensor]) -> None:
            # The texts travel to other ranks while the images are encoded.
            sent[head] = self.loss.send_texts(texts)

        for part, ratio in zip(parts, ratios, strict=True):
            targets = self._targets([part])
            with nullcontext() if part is parts[-1] else self._without_sync():
                encoded = self._encode(part, on_texts=send)
                outputs = self._contrast(
                    encoded.heads, sent, part.image_ids, _caption_ids(part), banks
                )
                others = encoded.others | self._distilled(encoded.heads, targets)
                self.backward(ratio * (self._mean(outputs) + self._sum(others)))
            steps.append(self._output(outputs, others))
        return StepOutput(
            _weighted([each.loss for each in steps], ratios),
            {
                name: _weighted([each.parts[name] for each in steps], ratios)
                for name in steps[0].parts
            },
            steps[-1].terms,
        )

    def _exact(self, parts: Sequence[Batch]) -> StepOutput:
        device, ratios = parts[0].images.device, _ratios(parts)
        targets = self._targets(parts)
        encoded, states = [], []
        with self._without_sync():
            for part in parts:
                states.append(_random_state(device))
                with torch.set_grad_enabled(part is parts[-1]):
                    encoded.append(self._encode(part))
        # The chain rule is cut at the features: this pass ends in `joined` and reaches neither a
        # parameter nor a wrapper's hooks, so it must not be scaled. `backward` scales below, once.
        joined = _joined([each.heads for each in encoded])
        caption_ids = [_caption_ids(part) for part in parts]
        outputs = self._contrast(
            joined,
            {},
            torch.cat([part.image_ids for part in parts]),
            {name: torch.cat([ids[name] for ids in caption_ids]) for name in caption_ids[0]},
        )
        distilled = self._distilled(joined, targets)
        torch.autograd.backward(self._mean(outputs) + self._sum(distilled))
        ends = list(accumulate(len(part.image_ids) for part in parts))
        rows = [slice(*ends_of) for ends_of in zip([0, *ends], ends, strict=False)]
        # Encoding again must not count twice: dropout goes on from here, and batch norm's running
        # statistics have seen every micro-batch already.
        after = _random_state(device)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        others = [encoded[-1].others] * len(parts)
        with self._without_sync():
            self._push(encoded[-1], joined, rows[-1], ratios[-1])
        del encoded  # and the last micro-batch's activations with it
        both = bool(others[-1])  # other losses read both sides
        images = both or any(_is_trained(head.image) for head in joined.values())
        texts = both or any(_is_trained(*head.text.values()) for head in joined.values())
        for k, part in enumerate(parts[:-1]):
            _restore_random_state(states[k], device)
            is_last = k == len(parts) - 2
            # Wrappers average over ranks in the first backward pass outside `no_sync`, and wait
            # there for every parameter, the scales included: they get their gradient in this one.
            with nullcontext() if is_last else self._without_sync():
                again = self._encode(part, images=images, texts=texts)
                others[k] = again.others
                self._push(again, joined, rows[k], ratios[k], scalars=is_last)
        with torch.no_grad():
            for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        _restore_random_state(after, device)
        return self._output(
            outputs,
            {
                name: _weighted([each[name].detach() for each in others], ratios)
                for name in others[0]
            }
            | distilled,
        )

    def _push(
        self,
        encoded: Encoded,
        joined: Mapping[str, Features],
        rows: slice,
        ratio: float,
        *,
        scalars: bool = False,
    ) -> None:
        """Differentiate the encoder by the gradients of its features.

        One scalar stands for the whole loss: the gradient of sum(features * g) by the parameters
        is that of a loss whose gradient by the features is g. As a scalar it can go through
        `backward`, which scales every pass.
        `joined`, whose `grad` is g, has all micro-batches; this one has its `rows`.
        """
        terms = [
            ratio * self.weights.get(name, 1.0) * loss
            for name, loss in encoded.others.items()
            if loss.requires_grad
        ]
        for name, head in encoded.heads.items():
            leaf = joined[name]
            pairs = [(text, leaf.text[language]) for language, text in head.text.items()]
            if head.image is not None and leaf.image is not None:
                pairs.append((head.image, leaf.image))
            terms += [(own * each.grad[rows]).sum() for own, each in pairs if each.grad is not None]
            if scalars:
                pairs = [(head.logit_scale, leaf.logit_scale)]
                if head.logit_bias is not None and leaf.logit_bias is not None:
                    pairs.append((head.logit_bias, leaf.logit_bias))
                terms += [own * each.grad for own, each in pairs if each.grad is not None]
        if terms:
            self.backward(torch.stack(terms).sum())

    def _encode(
        self,
        part: Batch,
        *,
        images: bool = True,
        texts: bool = True,
        on_texts: OnTexts | None = None,
    ) -> Encoded:
        """Encode a micro-batch; in the features of texts every sample has a row, as the loss reads.

        An absent caption's row is zeros, which cost next to nothing, and no tower has seen it.
        """

        def placed(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                language: by_sample(each, part.text_rows[language], len(part.image_ids))
                for language, each in features.items()
            }

        with self.autocast():
            encoded: Encoded = self.model(
                part.images if images else None,
                part.texts if texts else {},
                Hidden(part.text_rows, part.hidden_words, part.hidden_patches),
                on_texts and (lambda head, features: on_texts(head, placed(features))),
            )
        heads = {
            name: head._replace(text=placed(head.text)) for name, head in encoded.heads.items()
        }
        return Encoded(heads, encoded.others)

    def _contrast(
        self,
        heads: Mapping[str, Features],
        sent: Mapping[str, SentTexts],
        image_ids: Tensor,
        caption_ids: Mapping[str, Tensor],
        banks: Mapping[str, Bank] | None = None,
    ) -> dict[str, BilingualOutput]:
        """Compute the loss of every head."""
        outputs = {}
        for name, head in heads.items():
            assert head.image is not None
            texts = sent[name] if name in sent else self.loss.send_texts(head.text)
            outputs[name] = self.loss(
                head.image, texts, head.logit_scale, image_ids, caption_ids, head.logit_bias,
                None if banks is None else banks[name],
            )  # fmt: skip
        return outputs

    def _targets(self, parts: Sequence[Batch]) -> list[Targets]:
        """Have the teacher encode micro-batches, before the model's activations need memory."""
        return [] if self.distillation is None else list(map(self.distillation.targets, parts))

    def _distilled(
        self, heads: Mapping[str, Features], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        if self.distillation is None:
            return {}
        return self.distillation.losses(next(iter(heads.values())), targets)

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
        terms = {
            name: replace(term, loss=term.loss.detach())
            for name, term in next(iter(outputs.values())).terms.items()
        }
        return StepOutput(loss, parts | others, terms)

    def _without_sync(self) -> AbstractContextManager[None]:
        if self.no_sync is not None:
            return self.no_sync()
        context: AbstractContextManager[None] = getattr(self.model, "no_sync", nullcontext)()
        return context


def _ratios(parts: Sequence[Batch]) -> list[float]:
    """Return each micro-batch's part of the batch."""
    sizes = [len(part.image_ids) for part in parts]
    return [size / sum(sizes) for size in sizes]


def _caption_ids(part: Batch) -> dict[str, Tensor]:
    """Return a caption id for each sample by language, `NO_CAPTION` where it is missing."""
    samples = len(part.image_ids)
    return {
        language: by_sample(ids, part.text_rows[language], samples, missing=NO_CAPTION)
        for language, ids in part.caption_ids.items()
    }


def _weighted(losses: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    return torch.stack([ratio * loss for ratio, loss in zip(ratios, losses, strict=True)]).sum()


def _joined(heads: Sequence[Mapping[str, Features]]) -> dict[str, Features]:
    """Join the features of all micro-batches, as leaves whose gradients are collected."""
    joined = {}
    for name, last in heads[-1].items():
        of_parts = [each[name] for each in heads]
        joined[name] = Features(
            image=_leaf([each.image for each in of_parts if each.image is not None]),
            text={key: _leaf([each.text[key] for each in of_parts]) for key in last.text},
            logit_scale=_leaf([last.logit_scale]),
            logit_bias=None if last.logit_bias is None else _leaf([last.logit_bias]),
        )
    return joined


def _leaf(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors of micro-batches; only the last, which has a graph, shows what is trained."""
    joined = torch.cat(list(tensors)) if tensors[0].ndim else tensors[0]
    return joined.detach().requires_grad_(tensors[-1].requires_grad)


def _is_trained(*leaves: Tensor | None) -> bool:
    return any(leaf is not None and leaf.grad is not None for leaf in leaves)


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a model may draw from: the host's, the device's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def _restore_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
