import pytest
import torch
from torch import nn

from tests.builders import IMAGE_SIZE, tiny_model, tiny_tokenizer
from vlm.errors import ConfigError
from vlm.models.batch_norm import keep_locked_statistics
from vlm.models.pretraining import PretrainingModel
from vlm.training.adaptation import lock


def test_only_the_last_stages_train():
    groups = [[nn.Parameter(torch.ones(1)) for _ in range(2)] for _ in range(4)]
    lock(groups, unlocked=1, side="image")
    assert [[p.requires_grad for p in group] for group in groups] == [[False] * 2] * 3 + [
        [True] * 2
    ]


@pytest.mark.parametrize("unlocked", [-1, 4])
def test_stages_that_the_tower_has_not_are_refused(unlocked):
    groups = [[nn.Parameter(torch.ones(1))] for _ in range(4)]
    with pytest.raises(ConfigError, match=f"text_unlocked_groups is {unlocked}.*expected 0 to 3"):
        lock(groups, unlocked=unlocked, side="text")


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_locked_tower_has_no_trained_parameter_and_the_other_has_all(side):
    encoder = tiny_model(tiny_tokenizer())
    groups = {"image": encoder.image_groups(), "text": encoder.text_groups()}
    lock(groups[side], unlocked=0, side=side)
    towers = {"image": encoder.visual, "text": encoder.text}
    assert not any(parameter.requires_grad for parameter in towers.pop(side).parameters())
    assert all(parameter.requires_grad for parameter in next(iter(towers.values())).parameters())


def test_the_stages_of_both_sides_hold_every_parameter_of_the_towers_once():
    encoder = tiny_model(tiny_tokenizer())
    listed = [p for g in (*encoder.image_groups(), *encoder.text_groups()) for p in g]
    assert len(set(listed)) == len(listed)
    assert set(listed) == {*encoder.visual.parameters(), *encoder.text.parameters()}


def test_locked_batch_norms_keep_their_statistics_in_training():
    encoder = tiny_model(tiny_tokenizer())
    model = PretrainingModel(encoder)
    lock(encoder.image_groups(), unlocked=0, side="image")
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    model.train()
    encoder.encode_image(torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert any("running_mean" in name for name in before)
    for name, value in encoder.named_buffers():
        assert torch.equal(value, before[name]), name


def test_batch_norms_that_train_go_on_with_their_statistics():
    norm = nn.BatchNorm2d(3)
    keep_locked_statistics(norm)
    norm(torch.randn(4, 3, 5, 5))
    assert norm.num_batches_tracked == 1
