"""What a training step's loss sends, by formula and counted on real processes."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.meters import TensorMeter
from tests.support.processes import run_in_world
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.costs import Sizes, step_cost
from vlm.losses.plan import LossConfig, LossPlan

RANKS, LOCAL, DIM = 4, 6, 16
KINDS = ("softmax", "sigmoid")
CASES = [
    LossConfig(
        plan=LossPlan(kind=kind, group_size=group, mesh=mesh, duplicates=duplicates),
        captions=captions,
        text_text_weight=pair,
    )
    for kind, (group, mesh), duplicates, captions, pair in itertools.product(
        KINDS,
        [(4, (2, 2)), (4, (4, 1)), (2, (1, 2)), (1, (1, 1))],
        ("positive", "ignore"),
        ("apart", "together"),
        (0.0, 0.5),
    )
]


def counted(rank):
    """Bytes sent, collectives, and bytes of tensors that one step of each loss has at its peak."""
    found = []
    for config in CASES:
        loss = BilingualLoss(
            config.plan,
            together=config.captions == "together",
            text_pair=("zh", "en") if config.text_text_weight else None,
        )
        images, zh, en = (
            F.normalize(torch.randn(LOCAL, DIM), dim=1).requires_grad_() for _ in range(3)
        )
        own = torch.arange(LOCAL) + rank * LOCAL
        bias = torch.tensor(-1.0) if config.plan.kind == "sigmoid" else None
        with TensorMeter() as meter:
            texts = loss.send_texts({"zh": zh, "en": en})
            captions = {"zh": own, "en": own + 100}
            loss(images, texts, torch.tensor(9.0), own, captions, bias).loss.backward()
        found.append((meter.bytes_sent, sum(meter.collectives.values())))
    return torch.tensor(found)


@pytest.mark.distributed
def test_formulas_give_the_bytes_and_collectives_of_every_plan():
    costs = [
        step_cost(config, Sizes(RANKS, LOCAL, DIM), config.plan.mesh, texts=2) for config in CASES
    ]
    expected = torch.tensor([(cost.sent, cost.collectives) for cost in costs])
    for found in run_in_world(counted, RANKS):
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=0)
