"""What a report measures of a step: computed only then, and exchanged in one message."""

from collections.abc import Mapping
from typing import TypeAlias

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from vlm.batches.batch import Batch
from vlm.distributed.sharding import norm_of
from vlm.errors import ConfigError
from vlm.losses.contrastive import ContrastiveOutput
from vlm.models.encoder import Encoder
from vlm.training.step import StepResult

_GIB = 2**30

_Counted: TypeAlias = tuple[Tensor | int, Tensor | int]
"""Number of this rank's images or texts with a property, and of those that could have it."""


def measure(
    result: StepResult, batch: Batch, rates: Mapping[str, float], accelerator: Accelerator
) -> dict[str, float]:
    """Return what all ranks together have seen of a step; a collective operation.

    docs/training.md lists the names. This waits for the device.

    Args:
        result: Of this rank.
        batch: What it was computed of, on the host.
        rates: This rank's numbers on the steps since the last report, which are averaged.
        accelerator: Gathers.
    """
    means = {"loss": result.loss}
    means |= {f"loss/{_key(name)}": part for name, part in result.parts.items()}
    ratios: dict[str, _Counted] = {
        f"truncated_ratio/{_key(name)}": (count, int((rows < len(batch.uids)).sum()))
        for name, rows in batch.text_rows.items()
        if (count := batch.truncated.get(name)) is not None
    }
    ratios |= _of_terms(result.terms)
    if len(result.terms) > 1:
        means |= {f"loss/{_key(name)}": term.loss for name, term in result.terms.items()}
    own = [*means.values(), *rates.values(), *(each for pair in ratios.values() for each in pair)]
    numbers = [torch.as_tensor(each, dtype=torch.float32) for each in own]
    row = torch.stack([each.to(result.loss.device) for each in (*numbers, _memory(result.loss))])
    table = accelerator.gather(row[None]).double()  # a row a rank
    averaged = iter(table.mean(0).tolist())
    measured = {name: next(averaged) for name in (*means, *rates)}
    for name in ratios:
        part, whole = next(averaged), next(averaged)
        measured[name] = part / whole if whole else 0.0
    return measured | {
        "memory_gib": table[:, -1].max().item() / _GIB,
        "candidates": max(term.candidates for term in result.terms.values()),
        "gradient_norm": result.gradient_norm.item(),
        **{f"gradient_norm/{side}": each.item() for side, each in result.tower_norms.items()},
        "logit_scale": result.logit_scale.item(),
        "learning_rate": result.learning_rate,
    }


def tower_norms(encoder: Encoder, norm: Tensor, max_norm: float) -> dict[str, Tensor]:
    """Return the norm of each tower's gradient as it was before it was clipped.

    Called after clipping, since only then gradients are free of a precision's scale. Layers that
    towers share count in both; a tower that cannot say what belongs to it has no norm.

    Args:
        encoder: Its gradients are those of all ranks.
        norm: Of the whole gradient, before clipping.
        max_norm: What it was clipped to.
    """
    norms = {}
    for side, groups in (("image", encoder.image_groups), ("text", encoder.text_groups)):
        try:
            # In their order, so that a resumed run adds up the same numbers in the same order.
            parameters = dict.fromkeys(each for group in groups() for each in group)
        except ConfigError:
            continue
        gradients = [each.grad for each in parameters if each.grad is not None]
        if gradients:
            norms[side] = norm_of(gradients) * (norm / max_norm).clamp(min=1)
    return norms


def _of_terms(terms: Mapping[str, ContrastiveOutput]) -> dict[str, _Counted]:
    correct = torch.cat([term.correct for term in terms.values()])
    # Of texts, since an image has several captions of its own where all are contrasted together.
    matches = torch.cat([term.text_to_image.matches for term in terms.values()])
    ratios: dict[str, _Counted] = {
        "accuracy": (correct.sum(), len(correct)),
        "duplicate_ratio": ((matches > 1).sum(), (matches > 0).sum()),
    }
    if len(terms) > 1:
        ratios |= {
            f"accuracy/{_key(name)}": (term.correct.sum(), len(term.correct))
            for name, term in terms.items()
        }
    return ratios


def _key(name: str) -> str:
    """Return the name of a language, a head or a term without spaces, which trackers change."""
    return name.replace(" ", "_")


def _memory(like: Tensor) -> Tensor:
    """Return the most bytes of tensors on a GPU since the last call; of the process on a CPU."""
    if like.is_cuda:
        found = torch.cuda.max_memory_allocated(like.device)
        torch.cuda.reset_peak_memory_stats(like.device)
    else:
        found = psutil.Process().memory_info().rss
    return torch.tensor(float(found), device=like.device)
