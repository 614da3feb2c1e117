"""Steps on samples that lack captions, against the definition, which leaves them out."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.support.dense_loss import bilingual_definition, bilingual_terms, same
from tests.support.processes import run_in_world
from tests.support.vectors import batch_of_vectors, image_vectors, text_vectors
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.plan import LossPlan
from vlm.models.encoder import MAIN
from vlm.models.pretraining import Encoded, Features
from vlm.text.caption_ids import NO_CAPTION
from vlm.training.step import ContrastiveStep

LOCAL, WIDTH, DIM = 6, 5, 4
WEIGHTS = {"en": 0.5}
# Of each rank's six samples: z has Chinese alone, e English, b both and n neither. The ranks of a
# world take them in turn.
PATTERNS = {
    "all captions": ["bbbbbb"],
    "one-language pairs": ["zezeez"],
    "mixed": ["bzennb", "ebzbze", "nezbbb"],
    "ranks without a language": ["zzzzzz", "eeeeee"],
    "micro-batches without a language": ["zzzeee", "bnznne"],
    "ranks and micro-batches without any": ["nnnnnn", "zbennn"],
    "no English at all": ["zzznzn"],
    "nothing at all": ["nnnnnn"],
}
SPLITS = (1, 3)
CASES = list(itertools.product(("softmax", "sigmoid"), (False, True)))
PAIR_WEIGHT = 0.3


class Towers(nn.Module):
    """Two matrices, a temperature and a bias; counts the texts that it encodes."""

    def __init__(self, kind="softmax"):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        image, text = torch.randn(2, WIDTH, DIM, generator=generator, dtype=torch.float64)
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        bias = torch.tensor(-2.0, dtype=torch.float64)
        self.bias = nn.Parameter(bias) if kind == "sigmoid" else None
        self.texts = []

    def forward(self, images, texts, hidden=None, on_texts=None):
        self.texts.append({name: len(tokens.ids) for name, tokens in texts.items()})
        vectors = {name: text_vectors(tokens) for name, tokens in texts.items()}
        text = {name: F.normalize(each @ self.text, dim=1) for name, each in vectors.items()}
        if on_texts:
            on_texts(MAIN, text)
        image = None if images is None else F.normalize(image_vectors(images) @ self.image, dim=1)
        bias = None if self.bias is None else self.bias * 1
        return Encoded({MAIN: Features(image, text, self.log_scale.exp(), bias)}, {})


def vectors_of(pattern, world):
    """Vectors of all samples, with repeated concepts and captions; `NO_CAPTION` where one lacks."""
    samples = LOCAL * world
    there = "".join(pattern[rank % len(pattern)] for rank in range(world))
    generator = torch.Generator().manual_seed(samples)
    images, zh, en = torch.randn(3, samples, WIDTH, generator=generator, dtype=torch.float64)
    ids, *captions = torch.randint(0, samples - 1, (3, samples), generator=generator)
    for own, letters in zip(captions, ("zb", "eb"), strict=True):
        own[[letter not in letters for letter in there]] = NO_CAPTION
    return images, {"zh": zh, "en": en}, ids, dict(zip(("zh", "en"), captions, strict=True))


def features_of(towers, vectors):
    """Features of all samples, those of absent captions included: the definition drops them."""
    images, texts, ids, captions = vectors
    text = {name: F.normalize(each @ towers.text, dim=1) for name, each in texts.items()}
    return F.normalize(images @ towers.image, dim=1), text, ids, captions


def results_of(towers, loss):
    """Return a loss and the gradients of the towers' parameters."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]
    return [loss.detach(), *(gradient.clone() for gradient in gradients)]


def expected_of(vectors, case):
    """Return the loss and gradients by the definition, on one process."""
    kind, together = case
    towers = Towers(kind)
    terms = bilingual_terms(
        *features_of(towers, vectors), together=together, weights=WEIGHTS, pair=("zh", "en"),
        pair_weight=PAIR_WEIGHT,
    )  # fmt: skip
    loss = bilingual_definition(terms, kind, "positive", towers.log_scale.exp(), towers.bias)
    loss.backward()
    return results_of(towers, loss)


def step_of(model, case, *, mode="exact", **plan):
    kind, together = case
    loss = BilingualLoss(
        LossPlan(kind=kind, tile=4, **plan),
        weights=WEIGHTS,
        together=together,
        text_pair=("zh", "en"),
        text_pair_weight=PAIR_WEIGHT,
    )
    return ContrastiveStep(model, loss, mode=mode)


def batch_of(vectors, rank):
    images, texts, ids, captions = vectors
    own = slice(LOCAL * rank, LOCAL * (rank + 1))
    return batch_of_vectors(
        images[own], {name: each[own] for name, each in texts.items()}, ids[own],
        {name: each[own] for name, each in captions.items()},
    )  # fmt: skip


def _steps(rank, world, mesh, mode, cases):
    """Return this rank's results of every case, pattern and number of micro-batches."""
    results = []
    for case in cases:
        towers = Towers(case[0])
        model = nn.parallel.DistributedDataParallel(towers) if world > 1 else towers
        step = step_of(model, case, mode=mode, mesh=mesh)
        for pattern, parts in itertools.product(PATTERNS.values(), SPLITS):
            towers.zero_grad()
            output = step(batch_of(vectors_of(pattern, world), rank).split(parts))
            loss = output.loss.clone()
            if world > 1:
                dist.all_reduce(loss)
            results.append(results_of(towers, loss / world))
    return results


def wrong_ones(found, expected, named):
    """Return the names of results that are not the expected ones."""
    return [
        name
        for name, one, other in zip(named, found, expected, strict=True)
        if not all((a - b).abs().max() <= 1e-11 for a, b in zip(one, other, strict=True))
    ]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "mesh"), [(1, "auto"), (2, "auto"), (4, (2, 2))], ids=["1", "2", "4"]
)
def test_every_pattern_of_missing_captions_is_the_definition(world, mesh):
    arguments = (world, mesh, "exact", CASES)
    ranks = [_steps(0, *arguments)] if world == 1 else run_in_world(_steps, world, *arguments)
    named = list(itertools.product(CASES, PATTERNS, SPLITS))
    expected = {
        (case, name): expected_of(vectors_of(pattern, world), case)
        for case, (name, pattern) in itertools.product(CASES, PATTERNS.items())
    }
    for found in ranks:
        assert not wrong_ones(found, [expected[case, name] for case, name, _ in named], named)


def one_pass_definition(vectors, case, world, parts):
    """Each micro-batch's rows and columns against all up to it, the earlier ones detached."""
    _, together = case
    towers = Towers()
    features, total, bank = features_of(towers, vectors), 0, []
    size = LOCAL // parts
    for first in range(0, LOCAL, size):
        rows = [LOCAL * rank + first + k for rank in range(world) for k in range(size)]
        images, texts, ids, captions = features
        terms = bilingual_terms(
            images[rows], {name: each[rows] for name, each in texts.items()}, ids[rows],
            {name: each[rows] for name, each in captions.items()},
            together=together, weights=WEIGHTS, pair=("zh", "en"), pair_weight=PAIR_WEIGHT,
        )  # fmt: skip
        bank.append(terms)
        weights = sum(term.weight for term in terms)
        for k, term in enumerate(terms):
            earlier = [each[k] for each in bank[:-1]]
            value = sum(one_pass_side(term, earlier, side, towers) for side in (0, 1)) / 2
            total = total + term.weight / weights * value / parts
    total.backward()
    return results_of(towers, total)


def one_pass_side(term, earlier, side, towers):
    """The mean cross-entropy of a term's rows, or of its columns."""
    one, other = ("rows", "columns") if side == 0 else ("columns", "rows")
    own = getattr(term, one)
    if not len(own):
        return 0 * towers.log_scale
    behind = [getattr(each, other).detach() for each in earlier]
    logits = towers.log_scale.exp() * own @ torch.cat([getattr(term, other), *behind]).T
    keys = [key for each in (term, *earlier) for key in getattr(each, f"{other[:-1]}_keys")]
    target = same(getattr(term, f"{one[:-1]}_keys"), keys).double()
    return F.cross_entropy(logits, target / target.sum(1, keepdim=True))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_one_pass_leaves_out_missing_captions_in_every_micro_batch(world):
    cases = [case for case in CASES if case[0] == "softmax"]
    arguments = (world, "auto", "one_pass", cases)
    ranks = [_steps(0, *arguments)] if world == 1 else run_in_world(_steps, world, *arguments)
    named = list(itertools.product(cases, PATTERNS, SPLITS))
    expected = [
        one_pass_definition(vectors_of(PATTERNS[name], world), case, world, parts)
        for case, name, parts in named
    ]
    for found in ranks:
        assert not wrong_ones(found, expected, named)


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
@pytest.mark.parametrize("parts", SPLITS)
def test_no_absent_caption_is_encoded(mode, parts):
    towers = Towers()
    batch = batch_of(vectors_of(["zzebbe"], 1), 0)
    step_of(towers, ("softmax", False), mode=mode)(batch.split(parts))
    once = {
        1: [{"zh": 4, "en": 4}],
        # A language that a micro-batch lacks costs one text.
        3: [{"zh": 2, "en": 1}, {"zh": 1, "en": 2}, {"zh": 1, "en": 2}],
    }[parts]
    assert towers.texts == (once if mode == "one_pass" else once + once[:-1])
