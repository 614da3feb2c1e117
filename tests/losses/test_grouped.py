"""The grouped loss on real processes against the definition on one, forward and backward."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.support.processes import run_in_processes
from vlm.distributed.groups import split_into_groups
from vlm.losses.grouped import GroupedContrastiveLoss
from vlm.text.caption_ids import NO_CAPTION

LOCAL, WIDTH, STEPS = 3, 5, 3
LANGUAGES = ("zh", "en")


class Towers(nn.Module):
    """The smallest dual encoder: a matrix a tower and a temperature."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        image, text = torch.randn(2, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self.image, self.text = nn.Parameter(image), nn.Parameter(text)
        self.log_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, images, texts):
        return (
            F.normalize(images @ self.image, dim=-1),
            {language: F.normalize(x @ self.text, dim=-1) for language, x in texts.items()},
            self.log_scale.exp(),
        )


def global_batch(step, samples):
    """Inputs with repeated concepts, repeated captions and missing ones."""
    generator = torch.Generator().manual_seed(100 + step)
    images, *captions = torch.randn(
        1 + len(LANGUAGES), samples, WIDTH, generator=generator, dtype=torch.float64
    )
    texts = dict(zip(LANGUAGES, captions, strict=True))
    image_ids = torch.randint(0, samples - 1, (samples,), generator=generator)
    caption_ids = {
        language: torch.randint(0, 2 * samples, (samples,), generator=generator)
        for language in LANGUAGES
    }
    caption_ids["zh"][torch.rand(samples, generator=generator) < 0.3] = NO_CAPTION
    return images, texts, image_ids, caption_ids


def reference_loss(features, image_ids, caption_ids):
    """The definition for one group, pair by pair; nothing shared with the code under test."""
    images, texts, scale = features
    terms = []
    for language in LANGUAGES:
        captions = caption_ids[language]
        present = [i for i in range(len(captions)) if captions[i] != NO_CAPTION]
        if not present:
            terms.append(images.sum() * 0)
            continue
        logits = scale * images[present] @ texts[language][present].T
        matches = torch.tensor(
            [
                [bool(image_ids[i] == image_ids[j] or captions[i] == captions[j]) for j in present]
                for i in present
            ]
        )
        target = matches.double() / matches.sum(1, keepdim=True)
        terms.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
    return sum(terms) / len(terms)


def train_on_one_process(samples, group_samples):
    """SGD on the mean of the groups' losses."""
    towers = Towers()
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        images, texts, image_ids, caption_ids = global_batch(step, samples)
        group_losses = []
        for start in range(0, samples, group_samples):
            rows = slice(start, start + group_samples)
            features = towers(images[rows], {k: x[rows] for k, x in texts.items()})
            ids = {k: x[rows] for k, x in caption_ids.items()}
            group_losses.append(reference_loss(features, image_ids[rows], ids))
        loss = torch.stack(group_losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in towers.parameters()]


def train_on_this_rank(rank, group_size):
    """The same, with this rank's rows, the loss under test and DDP's averaging of gradients."""
    world_size = dist.get_world_size()
    towers = nn.parallel.DistributedDataParallel(Towers())
    loss_function = GroupedContrastiveLoss(split_into_groups(group_size))
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for step in range(STEPS):
        images, texts, image_ids, caption_ids = global_batch(step, LOCAL * world_size)
        rows = slice(rank * LOCAL, (rank + 1) * LOCAL)
        features = towers(images[rows], {k: x[rows] for k, x in texts.items()})
        loss = loss_function(
            *features, image_ids[rows], {k: x[rows] for k, x in caption_ids.items()}
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return [losses, [parameter.detach() for parameter in towers.parameters()]]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "group_size"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
)
def test_groups_train_like_one_process_with_the_group_batches(world_size, group_size):
    losses, parameters = train_on_one_process(LOCAL * world_size, LOCAL * group_size)
    for found_losses, found in run_in_processes(train_on_this_rank, world_size, group_size):
        torch.testing.assert_close(found_losses, losses, rtol=1e-12, atol=1e-12)
        for tensor, expected in zip(found, parameters, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-11, atol=1e-12)


def test_terms_count_by_their_weight():
    images, texts, image_ids, caption_ids = global_batch(0, 6)
    features = Towers()(images, texts)
    single = {
        language: GroupedContrastiveLoss()(
            features[0], {language: features[1][language]}, features[2], image_ids, caption_ids
        )
        for language in LANGUAGES
    }
    weighted = GroupedContrastiveLoss(weights={"en": 0.25})(*features, image_ids, caption_ids)
    torch.testing.assert_close(weighted, (single["zh"] + 0.25 * single["en"]) / 1.25)


def test_one_language_without_duplicates_is_the_loss_of_open_clip():
    from open_clip import ClipLoss

    images = F.normalize(torch.randn(6, WIDTH), dim=-1).requires_grad_()
    texts = F.normalize(torch.randn(6, WIDTH), dim=-1)
    scale = torch.tensor(20.0)
    ids = torch.arange(6)
    loss = GroupedContrastiveLoss()(images, {"en": texts}, scale, ids, {"en": ids})
    expected = ClipLoss()(images, texts, scale)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, images)
    torch.testing.assert_close(gradient, wanted)
