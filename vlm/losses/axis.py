"""What is known of the rows, or of the columns, of a rank's block, added up tile by tile."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from vlm.distributed.groups import RankGroup

# Up to this many ranks one all-gather costs less than two all-reduces: it sends k times the bytes
# of each vector, but in one message.
_FEW_RANKS = 4


@dataclass(frozen=True, slots=True)
class AxisLayout:
    """The rows, or the columns, of a rank's block."""

    own: slice
    """This rank's samples among them."""
    scored: int
    """How many of them, from the first, have a loss; the others are candidates only."""
    total: int
    """How many in the whole group have a loss."""
    candidates: int
    """How many there are in the whole group."""


class RowStatistics(NamedTuple):
    """Statistics of this rank's images against texts, or of its texts against images."""

    loss: Float[Tensor, " local"]
    """Each row's loss, in nats."""
    positive_logit: Float[Tensor, " local"]
    """Mean of the logits of its positives."""
    log_sum_exp: Float[Tensor, " local"] | None
    """Of its candidates' logits; None for a sigmoid loss."""
    correct: Bool[Tensor, " local"]
    """Whether no candidate is more similar than its most similar positive."""
    matches: Float[Tensor, " local"]
    """How many candidates match it, its own and those that are ignored included."""


class AxisStatistics:
    """Running statistics of the rows, or of the columns, that have a loss.

    Args:
        layout: Of the rows or columns.
        candidates: How many each is compared with in the whole group, ignored ones included.
        like: A tensor of the type and on the device of the statistics.
        softmax: Whether the loss is a softmax; otherwise it is a sigmoid.
        smoothing: Label smoothing of a softmax.
        by_ids: Whether a sample may have several positives, on any rank.
        ignoring: Whether some pairs are neither positive nor negative.
    """

    def __init__(
        self,
        layout: AxisLayout,
        candidates: int,
        like: Tensor,
        *,
        softmax: bool,
        smoothing: float = 0.0,
        by_ids: bool = False,
        ignoring: bool = False,
    ) -> None:
        self.layout, self.smoothing = layout, smoothing
        self._candidates = candidates
        # The lowest finite number, not -inf: the difference of two infinities would be nan.
        lowest, size = torch.finfo(like.dtype).min, layout.scored
        self.max = like.new_full((size,), lowest)
        # Relative to the running maximum, never to a fixed one: logits of any size stay finite.
        self.exp_sum = like.new_zeros(size) if softmax else None
        self.loss_sum = None if softmax else like.new_zeros(size)
        self.logit_sum = like.new_zeros(size) if smoothing else None
        self.positive_sum = like.new_zeros(size)
        # None without ids: every sample has one positive, which lies in its own rank's block.
        self.positive_count = like.new_zeros(size) if by_ids else None
        self.positive_max = like.new_full((size,), lowest) if by_ids else None
        self.ignored = like.new_zeros(size) if ignoring else None
        self.log_sum_exp: Tensor | None = None
        self._begun = False

    def add(self, span: slice, maximum: Tensor, exp_sum: Tensor) -> None:
        """Add the maxima of one tile, and its sums of exponentials relative to them."""
        assert self.exp_sum is not None
        if len(maximum) == len(self.max) and not self._begun:
            # The first tile of all rows is taken as it is. Small batches have no other one, and
            # what they cost is the number of operations.
            self.max, self.exp_sum, self._begun = maximum, exp_sum, True
            return
        self._begun = True
        # Both sums become relative to the higher maximum before they are added.
        before = self.max[span]
        after = torch.maximum(before, maximum)
        self.exp_sum[span].mul_((before - after).exp_()).add_(exp_sum * (maximum - after).exp_())
        before.copy_(after)

    def add_losses(self, span: slice, maximum: Tensor, losses: Tensor) -> None:
        """Add the maxima and the summed losses of one tile."""
        assert self.loss_sum is not None
        self.max[span] = torch.maximum(self.max[span], maximum)
        self.loss_sum[span] += losses

    def merge(self, group: RankGroup) -> None:
        """Merge what the ranks of a mesh row, or column, know of the same samples.

        Waits for all of them. The result is the same on every rank, to the bit.
        """
        if group.size > 1 and self.layout.scored:
            maxima = [each for each in (self.max, self.positive_max) if each is not None]
            sums = [
                each
                for each in (
                    self.exp_sum, self.loss_sum, self.logit_sum,
                    # Without ids the only rank that can see a positive is the one that needs it.
                    None if self.positive_count is None else self.positive_sum,
                    self.positive_count, self.ignored,
                )
                if each is not None
            ]  # fmt: skip
            merged = self._merged(torch.stack(maxima), torch.stack(sums), group)
            # In place: the order in the tables is that of the fields above.
            for field, values in zip([*maxima, *sums], merged, strict=True):
                field.copy_(values)
        if self.exp_sum is not None:
            self.log_sum_exp = self.max + self.exp_sum.log()

    def _merged(self, maxima: Tensor, sums: Tensor, group: RankGroup) -> list[Tensor]:
        if group.size <= _FEW_RANKS:
            # One collective, one wait: everyone computes the same sums of the same parts.
            own = torch.cat([maxima, sums])
            parts = own.new_empty(group.size, *own.shape)
            dist.all_gather_single(parts, own[None], group=group.process_group)
            all_maxima, all_sums = torch.split(parts, [len(maxima), len(sums)], dim=1)
            highest = all_maxima.amax(0)
            self._rescale_(all_sums, all_maxima[:, 0], highest[0])
            return [*highest, *all_sums.sum(0)]
        # Two collectives: the sums can only be added once all ranks know the maximum.
        highest = maxima.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group.process_group)
        self._rescale_(sums, maxima[0], highest[0])
        dist.all_reduce(sums, group=group.process_group)
        return [*highest, *sums]

    def _rescale_(self, sums: Tensor, maximum: Tensor, highest: Tensor) -> None:
        """Make sums of exponentials, which come first, relative to the highest maximum."""
        if self.exp_sum is not None:
            sums[..., 0, :] *= (maximum - highest).exp_()

    @property
    def candidates(self) -> Float[Tensor, " scored"] | int:
        """How many candidates each has in the whole group."""
        return self._candidates if self.ignored is None else self._candidates - self.ignored

    def positive_logits(self) -> Float[Tensor, " local"]:
        """Return the mean logit of each own sample's positives; 0 where it has none."""
        own = self.layout.own
        total = self.positive_sum[own]
        if self.positive_count is None:
            return total
        return total / self.positive_count[own].clamp(min=1)

    def losses(self) -> Float[Tensor, " local"]:
        """Return each own sample's loss, after merging."""
        own = self.layout.own
        if self.loss_sum is not None:
            # softplus(-z) = softplus(z) - z: the sum took every pair for a negative one.
            return self.loss_sum[own] - self.positive_sum[own]
        assert self.log_sum_exp is not None
        losses = self.log_sum_exp[own]
        if self.logit_sum is None:
            losses = losses - self.positive_logits()
        else:
            losses = losses - (1 - self.smoothing) * self.positive_logits()
            losses -= self.smoothing * (self.logit_sum / self.candidates)[own]
        if self.positive_count is not None:
            losses = torch.where(self.positive_count[own] > 0, losses, 0)
        return losses

    def of_own(self) -> RowStatistics:
        """Return the statistics of this rank's samples, after merging."""
        own = self.layout.own
        # >=, as the best candidate may be the positive itself; a tie with a negative is correct.
        if self.positive_count is None or self.positive_max is None:
            correct = self.positive_sum[own] >= self.max[own]
            matches = torch.ones_like(self.positive_sum[own])
        else:
            best = self.positive_max[own] >= self.max[own]
            correct = (self.positive_count[own] > 0) & best
            matches = self.positive_count[own]
        if self.ignored is not None:
            matches = matches + self.ignored[own]
        log_sum_exp = None if self.log_sum_exp is None else self.log_sum_exp[own]
        return RowStatistics(self.losses(), self.positive_logits(), log_sum_exp, correct, matches)
