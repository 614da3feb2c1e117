"""Contrastive terms of images with captions in several languages, sharing one exchange."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlm.distributed.gather import SentRows
from vlm.errors import ConfigError, DistributedError
from vlm.losses.contrastive import ContrastiveOutput, contrast
from vlm.losses.exchange import Exchange, Shares, Side
from vlm.losses.matches import FIRST_CAPTION, IMAGE, SAMPLE
from vlm.losses.plan import LossPlan
from vlm.text.caption_ids import NO_CAPTION


class BilingualOutput(NamedTuple):
    """The weighted mean of contrastive terms, and each of them."""

    loss: Float[Tensor, ""]
    """This rank's share: the mean over ranks is the loss."""
    terms: dict[str, ContrastiveOutput]
    """By `image-LANGUAGE` (`image-text` for captions together), and `LANGUAGE-LANGUAGE`."""


Bank = dict[str, list[tuple[Side, Side]]]
"""By term, what earlier micro-batches left as candidates."""


@dataclass(frozen=True, slots=True)
class SentTexts:
    """Text features on their way to the ranks that compare them."""

    languages: tuple[str, ...]
    columns: tuple[SentRows, ...]
    """What images are compared with: one a language, or one for all captions together."""
    pair: tuple[SentRows, SentRows | None] | None
    """The rows of a text-text term, and its columns where they are not among the others."""
    shares: Shares


class _Term(NamedTuple):
    """Two sides to contrast."""

    name: str
    weight: float
    rows: Side
    columns: Side


class BilingualLoss(nn.Module):
    """The weighted mean of a contrastive term for each language, and of one between two.

    Images travel once for all terms. Samples of one concept, and samples that share a
    caption, are each other's positives (or ignored, as the plan says); a sample that lacks a
    language takes no part in that language's terms.

    Making one is a collective operation: every rank must do it at the same point.

    Args:
        plan: Who contrasts with whom, and how.
        weights: Weight of a language's term; 1 where it is not named.
        together: Contrast images with the captions of all languages in one term of weight 1.
        text_pair: Two languages to contrast with each other.
        text_pair_weight: Weight of that term.

    Raises:
        DistributedError: the plan does not fit the number of ranks (on every rank).
    """

    def __init__(
        self,
        plan: LossPlan | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        together: bool = False,
        text_pair: tuple[str, str] | None = None,
        text_pair_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.exchange = Exchange(plan or LossPlan())
        self.weights = dict(weights or {})
        self.together = together
        self.text_pair = text_pair
        self.text_pair_weight = text_pair_weight

    def send_texts(self, text_features: Mapping[str, Float[Tensor, "local dim"]]) -> SentTexts:
        """Start to send unit vectors, by language; they travel while the images are encoded.

        Raises:
            ConfigError: a language of the text-text term is missing.
            DistributedError: the ranks' features do not fit together (on every rank).
        """
        missing = set(self.text_pair or ()) - set(text_features)
        if missing:
            raise ConfigError(
                f"there are captions in {', '.join(text_features)}; expected "
                f"{', '.join(missing)} as well for the text-text term"
            )
        shares = self.exchange.declare(text_features)
        send, features = self.exchange.send, list(text_features.values())
        per_sample = 1
        if self.together:
            # One message for all languages, sorted by language, not by sample.
            features, per_sample = [torch.cat(features)], len(features)
        # Returns while they travel; the waiting is in `forward`.
        columns = tuple(send(each, shares, "column", per_sample=per_sample) for each in features)
        pair = None
        if self.text_pair:
            first, second = (text_features[language] for language in self.text_pair)
            # Apart, the second language's captions are already on their way along the columns.
            second_sent = send(second, shares, "column") if self.together else None
            pair = send(first, shares, "row"), second_sent
        return SentTexts(tuple(text_features), columns, pair, shares)

    def forward(
        self,
        image_features: Float[Tensor, "local dim"],
        texts: SentTexts,
        logit_scale: Float[Tensor, ""],
        image_ids: Int64[Tensor, " local"],
        caption_ids: Mapping[str, Int64[Tensor, " local"]],
        logit_bias: Float[Tensor, ""] | None = None,
        bank: Bank | None = None,
    ) -> BilingualOutput:
        """Return this rank's share of the loss.

        Args:
            image_features: Unit vectors of this rank's images.
            texts: What `send_texts` made of their captions.
            logit_scale: Inverse temperature, not its logarithm.
            image_ids: Equal for samples of the same concept; not negative.
            caption_ids: By language, equal for equal captions; `NO_CAPTION` for a missing one.
            logit_bias: Added to every scaled similarity; for a sigmoid loss.
            bank: What earlier calls left as candidates, without gradients; this one's are added.

        Raises:
            ConfigError: a sigmoid loss lacks a bias, or a softmax has one.
            DistributedError: the ranks' features do not fit together (on every rank).
        """
        captions = [caption_ids[language] for language in texts.languages]
        counts = self._count_captions(dict(zip(texts.languages, captions, strict=True)))
        # The ranks wait for each other here for the second time; the texts were declared first.
        shares = self.exchange.declare({"image": image_features}, counts)
        _check_together(shares, texts.shares)
        images = self.exchange.send(image_features, shares, "row")
        table = self.exchange.id_table(image_ids, captions, shares)
        terms = self._receive(images, texts, table, shares)
        outputs = {}
        for term in terms:
            banked = [] if bank is None else bank.setdefault(term.name, [])
            outputs[term.name] = contrast(
                term.rows, term.columns, self.exchange, shares, logit_scale, logit_bias, banked
            )
            if bank is not None:
                # After contrasting, so that this micro-batch is no candidate of its own twice.
                number = len(banked)
                banked.append((term.rows.banked(number), term.columns.banked(number)))
        total = sum(term.weight for term in terms)
        # Ranks differentiate with the same factors, since weights are settings, not data.
        loss = torch.stack([term.weight / total * outputs[term.name].loss for term in terms]).sum()
        return BilingualOutput(loss, outputs)

    def _count_captions(self, caption_ids: Mapping[str, Int64[Tensor, " local"]]) -> list[int]:
        """Count the samples that have each language, then any, then both of the text pair."""
        present = {language: ids != NO_CAPTION for language, ids in caption_ids.items()}
        masks = [*present.values(), torch.stack(list(present.values())).any(0)]
        if self.text_pair:
            first, second = self.text_pair
            masks.append(present[first] & present[second])
        counts: list[int] = torch.stack(masks).sum(1).tolist()  # waits for the device, once
        return counts

    def _receive(
        self, images: SentRows, texts: SentTexts, table: Int64[Tensor, "local ids"], shares: Shares
    ) -> list[_Term]:
        """Wait for what was sent, and put together what is to be contrasted."""
        receive, gather_ids = self.exchange.receive, self.exchange.gather_ids
        languages = range(len(texts.languages))  # captions of the id table are in their order
        # As `_count_captions` counts them, summed over the group.
        with_each, with_any = shares.counts[: len(languages)], shares.counts[len(languages)]
        # The order of collectives from here on is the same on every rank.
        row_ids = gather_ids(table, shares, "row")
        column_ids = gather_ids(table, shares, "column")
        rows = receive(images, row_ids, shares, "row")
        terms = []
        if self.together:
            # As `torch.cat` of the features: all captions of the first language, then of the next.
            # Each has one caption column, whereas an image, being a row, keeps all of its captions.
            each = torch.cat([table[:, [SAMPLE, IMAGE, FIRST_CAPTION + k]] for k in languages])
            many = len(languages)
            ids = gather_ids(each, shares, "column", per_sample=many)
            columns = receive(texts.columns[0], ids, shares, "column", per_sample=many)
            # A row needs any caption; a column is one caption, and needs that one.
            rows_with_any = rows.with_captions(languages, with_any, every=False)
            columns = columns.with_captions([0], sum(with_each))
            terms.append(_Term("image-text", 1.0, rows_with_any, columns))
            sides = []
        else:
            sides = [receive(sent, column_ids, shares, "column") for sent in texts.columns]
        for k, side in enumerate(sides):
            language = texts.languages[k]
            weight = self.weights.get(language, 1.0)
            both = (each.with_captions([k], with_each[k]) for each in (rows, side))
            terms.append(_Term(f"image-{language}", weight, *both))
        if texts.pair and self.text_pair:
            first, second = texts.pair
            pair = [texts.languages.index(language) for language in self.text_pair]
            columns = (
                sides[pair[1]] if second is None else receive(second, column_ids, shares, "column")
            )
            sides_of_pair = receive(first, row_ids, shares, "row"), columns
            with_both = shares.counts[len(languages) + 1]
            both = (side.with_captions(pair, with_both) for side in sides_of_pair)
            terms.append(_Term("-".join(self.text_pair), self.text_pair_weight, *both))
        return terms


def _check_together(images: Shares, texts: Shares) -> None:
    """Refuse texts that were sent before and do not go with the images, on every rank alike."""
    if (texts.sizes, texts.kind) != (images.sizes, images.kind):
        found = [", ".join(map(str, each.sizes)) + f" x {each.kind}" for each in (images, texts)]
        raise DistributedError(
            f"the ranks of a loss group have {found[0]} for images and {found[1]} for texts; "
            "expected the same for both"
        )
