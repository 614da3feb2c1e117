"""Contrastive terms of images with captions in several languages, sharing one exchange."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlm.distributed.gather import SentRows
from vlm.errors import ConfigError, DistributedError
from vlm.losses.contrastive import ContrastiveOutput, contrast
from vlm.losses.exchange import Exchange, Shares, Side
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

_FIRST_CAPTION = 2  # column of the id table


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
        """Start to send the texts, so that they travel while the images are encoded.

        Args:
            text_features: By language, unit vectors of this rank's captions.

        Raises:
            ConfigError: a language of the text-text term is missing.
            DistributedError: the ranks' features do not fit together (on every rank).
        """
        self._check_languages(text_features)
        return self._send_texts(text_features, self.exchange.declare(text_features))

    def forward(
        self,
        image_features: Float[Tensor, "local dim"],
        text_features: Mapping[str, Float[Tensor, "local dim"]] | SentTexts,
        logit_scale: Float[Tensor, ""],
        image_ids: Int64[Tensor, " local"],
        caption_ids: Mapping[str, Int64[Tensor, " local"]],
        logit_bias: Float[Tensor, ""] | None = None,
        bank: Bank | None = None,
    ) -> BilingualOutput:
        """Return this rank's share of the loss.

        Args:
            image_features: Unit vectors of this rank's images.
            text_features: By language, unit vectors of their captions, or what `send_texts`
                made of them.
            logit_scale: Inverse temperature, not its logarithm.
            image_ids: Equal for samples of the same concept; not negative.
            caption_ids: By language, equal for equal captions; `NO_CAPTION` for a missing one.
            logit_bias: Added to every scaled similarity; for a sigmoid loss.
            bank: What earlier calls left as candidates, without gradients; this one's are added.

        Raises:
            ConfigError: a sigmoid loss lacks a bias, or a softmax has one.
            DistributedError: the ranks' features do not fit together (on every rank).
        """
        if isinstance(text_features, SentTexts):
            languages = text_features.languages
        else:
            languages = tuple(text_features)
        self._check_languages(languages)
        counts = self._count_captions({name: caption_ids[name] for name in languages})
        if isinstance(text_features, SentTexts):
            texts, shares = text_features, self.exchange.declare({"image": image_features}, counts)
            _check_against(texts.shares, shares)
        else:
            features = {"image": image_features, **text_features}
            shares = self.exchange.declare(features, counts)
            texts = self._send_texts(text_features, shares)
        images = self.exchange.send(image_features, shares, "row")
        captions = [caption_ids[language] for language in languages]
        table = self.exchange.id_table(image_ids, captions, shares)
        terms = self._receive(images, texts, table, shares)
        outputs = {}
        for term in terms:
            banked = [] if bank is None else bank.setdefault(term.name, [])
            outputs[term.name] = contrast(
                term.rows, term.columns, self.exchange, shares, logit_scale, logit_bias, banked
            )
            if bank is not None:
                number = len(banked)
                banked.append((term.rows.banked(number), term.columns.banked(number)))
        total = sum(term.weight for term in terms)
        loss = torch.stack([term.weight / total * outputs[term.name].loss for term in terms]).sum()
        return BilingualOutput(loss, outputs)

    def _check_languages(self, languages: Iterable[str]) -> None:
        missing = set(self.text_pair or ()) - set(languages)
        if missing:
            raise ConfigError(
                f"there are captions in {', '.join(languages)}; expected {', '.join(missing)} as "
                "well for the text-text term"
            )

    def _count_captions(self, caption_ids: Mapping[str, Int64[Tensor, " local"]]) -> list[int]:
        """Count the samples that have a language, that have any, and that have both of the pair."""
        present = {language: ids != NO_CAPTION for language, ids in caption_ids.items()}
        both = [present[language] for language in self.text_pair or ()]
        masks = [
            *present.values(),
            torch.stack(list(present.values())).any(0),
            *([torch.stack(both).all(0)] if both else []),
        ]
        counts: list[int] = torch.stack(masks).sum(1).tolist()
        return counts

    def _send_texts(
        self, text_features: Mapping[str, Float[Tensor, "local dim"]], shares: Shares
    ) -> SentTexts:
        send, features = self.exchange.send, list(text_features.values())
        many = len(features) if self.together else 1
        if self.together:
            features = [torch.cat(features)]
        columns = tuple(send(each, shares, "column", per_sample=many) for each in features)
        pair = None
        if self.text_pair:
            first, second = (text_features[language] for language in self.text_pair)
            pair = (
                send(first, shares, "row"),
                send(second, shares, "column") if self.together else None,
            )
        return SentTexts(tuple(text_features), columns, pair, shares)

    def _receive(
        self, images: SentRows, texts: SentTexts, table: Int64[Tensor, "local ids"], shares: Shares
    ) -> list[_Term]:
        """Wait for what was sent, and put together what is to be contrasted."""
        receive, gather_ids = self.exchange.receive, self.exchange.gather_ids
        languages, counts = texts.languages, shares.counts
        number = len(languages)
        captions = range(_FIRST_CAPTION, _FIRST_CAPTION + number)
        row_ids = gather_ids(table, shares, "row")
        column_ids = gather_ids(table, shares, "column")
        image_side = receive(images, row_ids, shares, "row")
        terms = []
        if self.together:
            each = torch.cat([table[:, [0, 1, caption]] for caption in captions])
            ids = gather_ids(each, shares, "column", per_sample=number)
            side = receive(texts.columns[0], ids, shares, "column", per_sample=number)
            rows = image_side.with_captions(captions, counts[number], every=False)
            columns = side.with_captions([_FIRST_CAPTION], sum(counts[:number]))
            terms.append(_Term("image-text", 1.0, rows, columns))
        sides = (
            []
            if self.together
            else [receive(sent, column_ids, shares, "column") for sent in texts.columns]
        )
        for language, caption, side, count in zip(languages, captions, sides, counts, strict=False):
            rows, columns = (each.with_captions([caption], count) for each in (image_side, side))
            weight = self.weights.get(language, 1.0)
            terms.append(_Term(f"image-{language}", weight, rows, columns))
        if texts.pair and self.text_pair:
            first, second = texts.pair
            places = [languages.index(language) for language in self.text_pair]
            pair = [captions[place] for place in places]
            rows = receive(first, row_ids, shares, "row")
            columns = (
                sides[places[1]]
                if second is None
                else receive(second, column_ids, shares, "column")
            )
            rows, columns = (e.with_captions(pair, counts[number + 1]) for e in (rows, columns))
            terms.append(_Term("-".join(self.text_pair), self.text_pair_weight, rows, columns))
        return terms


def _check_against(texts: Shares, images: Shares) -> None:
    if (texts.sizes, texts.dim) != (images.sizes, images.dim):
        raise DistributedError(
            f"the ranks of a loss group bring {_listed(images.sizes)} images of width "
            f"{images.dim} and {_listed(texts.sizes)} texts of width {texts.dim}; expected as many "
            "of both on each, of one width"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
