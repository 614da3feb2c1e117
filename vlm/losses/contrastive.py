"""The contrastive loss of images and texts over a group of ranks.

Convention, here and everywhere: the mean over ranks of the returned loss is the loss, and
averaging parameter gradients over ranks, as DDP and FSDP do, gives its true gradient, for
features, scale and bias alike. With groups smaller than the world the loss is the mean of the
groups' losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.losses.axis import AxisStatistics, RowStatistics
from vlm.losses.block import Block
from vlm.losses.exchange import Exchange, Shares, Side
from vlm.losses.matches import OwnPairs, SharedIds
from vlm.losses.plan import LossPlan
from vlm.losses.sigmoid import sigmoid_loss
from vlm.losses.softmax import softmax_loss
from vlm.text.caption_ids import NO_CAPTION


class PairIds(NamedTuple):
    """Ids by which the pairs of a batch match each other, on any rank."""

    image: Int64[Tensor, " local"]
    """Equal for samples of the same concept or image; not negative."""
    caption: Int64[Tensor, " local"]
    """Equal for equal captions, not negative; `NO_CAPTION` for a pair that takes no part."""


@dataclass(frozen=True)
class ContrastiveOutput:
    """A contrastive loss, and what it saw."""

    loss: Float[Tensor, ""]
    """This rank's share: the mean over ranks is the loss."""
    candidates: int
    """How many texts of the group each image was compared with."""
    rows: AxisStatistics
    """Merged, of the images of this rank's mesh row."""
    columns: AxisStatistics
    """Merged, of the texts of its mesh column."""

    @cached_property
    def image_to_text(self) -> RowStatistics:
        """Of this rank's images."""
        return self.rows.of_own()

    @cached_property
    def text_to_image(self) -> RowStatistics:
        """Of this rank's texts."""
        return self.columns.of_own()

    @property
    def correct(self) -> Bool[Tensor, " images_and_texts"]:
        """Whether the most similar candidate of each of this rank's images and texts is correct."""
        return torch.cat([self.image_to_text.correct, self.text_to_image.correct])

    @property
    def accuracy(self) -> Float[Tensor, ""]:
        """Ratio of this rank's images and texts whose most similar candidate is correct."""
        return self.correct.sum() / max(len(self.correct), 1)


class ContrastiveLoss(nn.Module):
    """Contrasts images with texts inside groups of ranks, as a plan says.

    Making one is a collective operation: every rank must do it at the same point.

    Raises:
        DistributedError: the plan does not fit the number of ranks (on every rank).
    """

    def __init__(self, plan: LossPlan | None = None) -> None:
        super().__init__()
        self.exchange = Exchange(plan or LossPlan())

    def forward(
        self,
        image_features: Float[Tensor, "local dim"],
        text_features: Float[Tensor, "local dim"],
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None = None,
        ids: PairIds | None = None,
    ) -> ContrastiveOutput:
        """Return this rank's share of the loss.

        Args:
            image_features: Unit vectors of this rank's images.
            text_features: Unit vectors of their texts.
            logit_scale: Inverse temperature, not its logarithm.
            logit_bias: Added to every scaled similarity; for a sigmoid loss.
            ids: By which pairs match; without them every pair matches itself alone.

        Raises:
            ConfigError: a sigmoid loss lacks a bias, or a softmax has one.
            DistributedError: the ranks' features do not fit together (on every rank).
        """
        # int() waits for the device; every rank has to know how many pairs the group has.
        present = len(image_features) if ids is None else int((ids.caption != NO_CAPTION).sum())
        shares = self.exchange.declare({"image": image_features, "text": text_features}, [present])
        # Both travel at once; the waiting is in `receive`.
        texts = self.exchange.send(text_features, shares, "column")
        images = self.exchange.send(image_features, shares, "row")
        row_ids = column_ids = None  # every pair matches itself alone
        if ids is not None:
            table = self.exchange.id_table(ids.image, [ids.caption], shares)
            row_ids = self.exchange.gather_ids(table, shares, "row")
            column_ids = self.exchange.gather_ids(table, shares, "column")
        columns = self.exchange.receive(texts, column_ids, shares, "column")
        rows = self.exchange.receive(images, row_ids, shares, "row")
        # The only caption of a sample here; those without one drop out on every rank alike.
        rows, columns = (side.with_captions([0], shares.counts[0]) for side in (rows, columns))
        return contrast(rows, columns, self.exchange, shares, logit_scale, logit_bias)


def contrast(
    rows: Side,
    columns: Side,
    exchange: Exchange,
    shares: Shares,
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""] | None = None,
    bank: Sequence[tuple[Side, Side]] = (),
) -> ContrastiveOutput:
    """Contrast what this rank received: images of its mesh row with texts of its mesh column.

    In a text-text term texts are the rows. Rows and columns of the bank, detached, are candidates
    only.

    Raises:
        ConfigError: a sigmoid loss lacks a bias, or a softmax has one.
    """
    plan = exchange.plan
    if (plan.kind == "sigmoid") != (logit_bias is not None):
        found, expected = ("no", "one") if logit_bias is None else ("a", "none")
        raise ConfigError(
            f"there is {found} logit_bias for a {plan.kind} loss; expected {expected}"
        )
    rows = rows.with_candidates([images for images, _ in bank])
    columns = columns.with_candidates([texts for _, texts in bank])
    if rows.ids is None or columns.ids is None:
        # Without ids no rank needs to know of other ranks' pairs.
        matches: OwnPairs | SharedIds = OwnPairs(rows.layout.own, columns.layout.own)
    else:
        matches = SharedIds(rows.ids, columns.ids, plan.duplicates)
    block = Block(exchange.mesh, plan, rows.layout, columns.layout, matches, _product_dtype(rows))
    features = rows.features, columns.features
    if logit_bias is None:
        loss, of_rows, of_columns = softmax_loss(*features, logit_scale, block)
    else:
        loss, of_rows, of_columns = sigmoid_loss(*features, logit_scale, logit_bias, block)
    # The weight comes last and is the same on all ranks of the group, as a gradient needs.
    return ContrastiveOutput(loss * shares.weight, columns.layout.candidates, of_rows, of_columns)


def _product_dtype(side: Side) -> torch.dtype:
    """Return the type to multiply in: where half precision loses nothing and is faster, that."""
    # Features that were rounded to travel lose nothing by being multiplied in that type. On a CPU
    # its products are slower.
    features, halves = side.features, (torch.bfloat16, torch.float16)
    if features.is_cuda and features.dtype == torch.float32 and side.rounded_to in halves:
        return side.rounded_to
    return features.dtype
