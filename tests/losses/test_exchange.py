"""What ranks bring: uneven numbers of samples, and what every rank must refuse alike."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.dense_loss import softmax_definition
from tests.support.processes import run_in_world
from vlm.errors import ConfigError, DistributedError
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.contrastive import ContrastiveLoss, PairIds
from vlm.losses.plan import LossPlan

DIM = 4


def features(samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        F.normalize(torch.randn(samples, DIM, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    ]


def _uneven(rank, sizes, group_size, mesh, with_ids):
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    images, texts = (each[own].clone().requires_grad_() for each in features(sum(sizes)))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    ids = PairIds(*torch.arange(2 * sum(sizes)).reshape(2, -1)[:, own]) if with_ids else None
    plan = LossPlan(even=False, tile=2, group_size=group_size, mesh=mesh)
    output = ContrastiveLoss(plan)(images, texts, scale, None, ids)
    output.loss.backward()
    totals = [output.loss.detach(), scale.grad]
    for total in totals:
        dist.all_reduce(total)
    return [*(t / len(sizes) for t in totals), images.grad / len(sizes), texts.grad / len(sizes)]


@pytest.mark.distributed
@pytest.mark.parametrize("with_ids", [False, True], ids=["own pairs", "ids"])
@pytest.mark.parametrize(
    ("sizes", "group_size", "mesh"),
    [
        ((3, 2, 3, 1), None, (2, 2)),
        ((3, 0, 1, 2), None, (2, 2)),
        ((0, 0, 4, 3), None, (2, 2)),
        ((2, 3, 1, 0), None, "text"),
        ((0, 1, 0, 0), None, "image"),
        ((3, 1, 2, 2), 2, "auto"),
        ((3, 1, 0, 0), 2, "auto"),
        ((3, 1, 2, 0), 1, "auto"),
    ],
)
def test_ranks_with_any_number_of_samples_count_every_sample_alike(
    sizes, group_size, mesh, with_ids
):
    """Identity 8: the loss is the mean of the groups' losses, weighted by their samples."""
    images, texts = (each.requires_grad_() for each in features(sum(sizes)))
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    size = group_size or len(sizes)
    groups = [slice(([0, *ends])[k], ends[k + size - 1]) for k in range(0, len(sizes), size)]
    loss = sum(
        softmax_definition(images[rows], texts[rows], scale) * (rows.stop - rows.start)
        for rows in groups
        if rows.stop > rows.start
    ) / sum(sizes)
    loss.backward()
    results = run_in_world(_uneven, len(sizes), sizes, group_size, mesh, with_ids)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    for found, scale_gradient, _, _ in results:
        torch.testing.assert_close(found, loss.detach(), **exact)
        torch.testing.assert_close(scale_gradient, scale.grad, **exact)
    for place, expected in ((2, images.grad), (3, texts.grad)):
        torch.testing.assert_close(torch.cat([r[place] for r in results]), expected, **exact)


def with_nan(images, texts):
    images[0, 0] = torch.nan
    return images, texts


# What rank 1 makes of its features, or of its plan, where the others keep theirs.
FAULTS = {
    "rows": lambda images, texts: features(3),
    "pairs": lambda images, texts: (images, torch.cat([texts, texts])),
    "width": lambda images, texts: (images[:, :3], texts[:, :3]),
    "width of uneven": lambda images, texts: (images[:, :3], texts[:, :3]),
    "type": lambda images, texts: (images.float(), texts.float()),
    "mixed types": lambda images, texts: (images, texts.float()),
    "integers": lambda images, texts: (images.long(), texts.long()),
    "vectors": lambda images, texts: (images[0], texts[0]),
    "not finite": with_nan,
    "frozen": lambda images, texts: (images.requires_grad_(), texts),
}


def _error(rank, case):
    images, texts = features(2)
    smoothing = 0.1 if case == "plan" and rank == 1 else 0.0
    plan = LossPlan(check_finite=True, even="uneven" not in case, label_smoothing=smoothing)
    loss = ContrastiveLoss(plan)
    if rank == 1 and case in FAULTS:
        images, texts = FAULTS[case](images, texts)
    try:
        loss(images, texts, torch.tensor(1.0, dtype=torch.float64))
    except DistributedError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("rows", "the ranks of a loss group have 2, 3, 2 samples; expected equal numbers, or "),
        ("pairs", "rank 1 has 2 x 4 float64 features on cpu for image and 4 x 4 float64 "),
        ("width", "rank 1 has 2 x 3 float64 features on cpu and rank 0 2 x 4 float64 features"),
        ("width of uneven", "rank 1 has 2 x 3 float64 features on cpu and rank 0 2 x 4 float64"),
        ("type", "rank 1 has 2 x 4 float32 features on cpu and rank 0 2 x 4 float64 features"),
        ("mixed types", "rank 1 has 2 x 4 float64 features on cpu for image and 2 x 4 float32"),
        ("integers", "rank 1 has 2 x 4 non-float features on cpu; expected floating-point "),
        ("vectors", "rank 1 has 4 x ... (not a matrix) float64 features on cpu; expected "),
        ("not finite", "rank 1 has features that are not finite; expected finite ones"),
        ("frozen", "ranks 0 and 1 need gradients for different features; expected the same "),
        ("plan", "ranks 0 and 1 have different loss plans or languages; expected the same on all"),
    ],
)
def test_every_rank_refuses_what_one_of_them_brings(case, message):
    """Identity 15: nothing hangs, and the numbers are in the message everywhere."""
    errors = run_in_world(_error, 3, case)
    assert len(set(errors)) == 1
    assert errors[0].startswith(message)


def _sent_and_contrasted(rank, widths):
    loss = BilingualLoss()
    images, texts = features(3)
    sent = loss.send_texts({"en": texts})
    images = images[: 3 - (rank == 1 and not widths), : 3 if widths else 4]
    ids = torch.arange(len(images))
    try:
        loss(images, sent, torch.tensor(1.0, dtype=torch.float64), ids, {"en": ids})
    except DistributedError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (False, "have 3, 2 samples; expected equal numbers"),
        (True, "have 3, 3 x 3 float64 features on cpu for images and 3, 3 x 4 float64 features"),
    ],
)
def test_every_rank_refuses_images_that_do_not_go_with_the_texts_sent_before(widths, message):
    errors = run_in_world(_sent_and_contrasted, 2, widths)
    assert errors[0] == errors[1]
    assert message in errors[0]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; expected at least 0, less than 1"),
        ({"label_smoothing": 0.1, "kind": "sigmoid"}, "label_smoothing is 0.1 for a sigmoid"),
        ({"tile": 0}, "tile is 0; expected at least 1 row"),
        ({"tile": (4, -1)}, r"tile is \(4, -1\); expected at least 1 row"),
        ({"keep_logits_mib": -1}, "keep_logits_mib is -1; expected at least 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan, message):
    with pytest.raises(ConfigError, match=message):
        LossPlan(**plan)


@pytest.mark.parametrize(
    ("kind", "bias", "message"),
    [
        ("sigmoid", None, "there is no logit_bias for a sigmoid loss; expected one"),
        ("softmax", torch.tensor(1.0), "there is a logit_bias for a softmax loss; expected none"),
    ],
)
def test_a_bias_belongs_to_a_sigmoid_loss(kind, bias, message):
    with pytest.raises(ConfigError, match=message):
        ContrastiveLoss(LossPlan(kind=kind))(*features(2), torch.tensor(1.0), bias)


@pytest.mark.usefixtures("unchecked")
def test_one_process_refuses_features_that_do_not_match():
    images, texts = features(3)
    message = "rank 0 has 3 x 4 float64 features on cpu for image and 2 x 4"
    with pytest.raises(DistributedError, match=message):
        ContrastiveLoss()(images, texts[:2], torch.tensor(1.0))
