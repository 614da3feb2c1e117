"""How far features are from those that a frozen model, the teacher, has of the same samples.

Every function returns this rank's share: the mean over ranks is the loss of their whole group, as
with the contrastive loss. Features are unit vectors of one width a model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.distributed.gather import gather_rows, send_rows, sum_over
from vlm.distributed.groups import RankGroup

# Of a candidate that is left out: its probability is 0 in any float, and its logit stays finite.
_LEFT_OUT = -1e4


class Side(NamedTuple):
    """A batch's images, or its captions in one language, as both models see them."""

    own: Float[Tensor, "local dim"]
    """Of the model that is trained."""
    target: Float[Tensor, "local teacher_dim"]
    """The teacher's, without a gradient."""
    there: Bool[Tensor, " local"]
    """False where a sample has no such caption, or no target; its features are any finite ones."""


def feature_distance(sides: Sequence[Side], group: RankGroup) -> Float[Tensor, ""]:
    """Return the mean squared distance to the teacher's features, which are of the same width.

    CLIP-KD's feature distillation (Yang et al. 2024), the mean over the sides that have targets.
    """
    distances = [(side.own - side.target).square().sum(1) for side in sides]
    return _mean_over_sides(distances, [side.there for side in sides], group)


def structure_divergence(
    sides: Sequence[Side], logit_scale: Float[Tensor, ""], group: RankGroup
) -> Float[Tensor, ""]:
    """Return how far the similarities within each side are from the teacher's.

    The divergence from the teacher's distribution over all other samples of the group to the
    model's, as SEED has it for images (Fang et al. 2021, section 3.2), at the teacher's scale.
    """
    values = []
    for side in sides:
        everyone = _gathered(side, group)
        others = everyone.there.repeat(len(side.own), 1)
        first = group.rank * len(side.own)
        others[:, first : first + len(side.own)].fill_diagonal_(False)
        values.append(
            _divergence(
                logit_scale * side.own @ everyone.own.T,
                logit_scale * side.target @ everyone.target.T,
                others,
            )
        )
    return _mean_over_sides(values, [side.there for side in sides], group)


def logit_divergence(
    image: Side,
    texts: Sequence[Side],
    logit_scale: Float[Tensor, ""],
    teacher_scale: Float[Tensor, ""],
    group: RankGroup,
) -> Float[Tensor, ""]:
    """Return how far the similarities of images and captions are from the teacher's.

    The divergence from the teacher's distribution over the captions of an image, and over the
    images of a caption, to the model's, each at its own scale: CLIP-KD's contrastive relational
    distillation (Yang et al. 2024), up to a constant TinyCLIP's affinity mimicking (Wu et al.
    2023). A language's term has the samples with its captions alone.
    """
    values, there = [], []
    images = _gathered(image, group)
    for text in texts:
        captions = _gathered(text, group)
        for (own, target, _), everyone in ((image, captions), (text, images)):
            values.append(
                _divergence(
                    logit_scale * own @ everyone.own.T,
                    teacher_scale * target @ everyone.target.T,
                    captions.there[None],
                )
            )
            there.append(text.there)
    return _mean_over_sides(values, there, group)


def _gathered(side: Side, group: RankGroup) -> Side:
    """Return a side of all ranks of the group, which have as many samples each."""
    sizes, dtype = [len(side.own)] * group.size, side.own.dtype
    sent = send_rows(
        side.own, group, sizes, dtype=dtype, wire_dtype=dtype, gradient_wire_dtype=dtype
    )
    # Integers: not every backend sends booleans.
    there = gather_rows(side.there.to(torch.uint8), group, sizes).bool()
    return Side(sent.receive(), gather_rows(side.target, group, sizes), there)


def _divergence(
    own: Float[Tensor, "rows columns"],
    target: Float[Tensor, "rows columns"],
    candidates: Bool[Tensor, "rows_or_one columns"],
) -> Float[Tensor, " rows"]:
    """Return the Kullback-Leibler divergence of each row; 0 where it has no candidate."""
    log_own, log_target = (
        each.masked_fill(~candidates, _LEFT_OUT).log_softmax(1) for each in (own, target)
    )
    return F.kl_div(log_own, log_target, reduction="none", log_target=True).sum(1)


def _mean_over_sides(
    values: Sequence[Float[Tensor, " local"]],
    there: Sequence[Bool[Tensor, " local"]],
    group: RankGroup,
) -> Float[Tensor, ""]:
    """Return the mean, over sides that have any in the group, of the mean of a side's values."""
    counts = sum_over(torch.stack([each.sum() for each in there]).to(values[0].dtype), group)
    sums = torch.stack([(each * row).sum() for each, row in zip(values, there, strict=True)])
    return (sums * group.size / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
