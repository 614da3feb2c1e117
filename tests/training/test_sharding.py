"""Sharded weights: the losses, gradients and weights of DDP, whole again for whoever needs them."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from tests.builders import IMAGE_SIZE, TINY_MODEL, tiny_tokenizer
from tests.models.test_pretraining import TINY_MULTIWAY
from tests.support.processes import run_in_world
from vlm.batches.batch import Batch
from vlm.distributed.groups import world_group
from vlm.distributed.sharding import (
    ShardedModel,
    Sharding,
    clip_gradients,
    launched_sharding,
    sharding_is_ours,
    whole,
)
from vlm.errors import ConfigError
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.plan import LossPlan
from vlm.models.batch_norm import synchronize_batch_norm
from vlm.models.blocks import compile_blocks, recompute
from vlm.models.build import build_from_config
from vlm.models.pretraining import PretrainingModel
from vlm.training.config import OptimizerConfig
from vlm.training.optimization.optimizer import build_optimizer
from vlm.training.saving.state import OptimizerState
from vlm.training.step import ContrastiveStep

WORLD, LOCAL, STEPS = 4, 4, 10
CPU = torch.device("cpu")
WORDS = ["red", "apple", "grey", "cat", "small", "dog", "fast", "train"]
MODELS = {
    "multiway": replace(TINY_MULTIWAY, multiway=replace(TINY_MULTIWAY.multiway, layers=2)),
    "two towers": replace(
        TINY_MODEL,
        vision_cfg=replace(TINY_MODEL.vision_cfg, timm_model_name="test_vit"),
        text_cfg=replace(TINY_MODEL.text_cfg, layers=3),
    ),
    "batch norm": TINY_MODEL,
}
FULL, KEPT, HYBRID = Sharding(WORLD, 1, True), Sharding(WORLD, 1, False), Sharding(2, 2, True)


def build(kind):
    torch.manual_seed(0)
    encoder = build_from_config(MODELS[kind], tiny_tokenizer())
    return synchronize_batch_norm(PretrainingModel(encoder), world_group(), CPU)


def batch_of(rank, step):
    """Samples of one rank; every third has no English caption."""
    tokenizer = tiny_tokenizer()
    numbers = [LOCAL * (WORLD * step + rank) + k for k in range(LOCAL)]
    generator = torch.Generator().manual_seed(numbers[0])
    rows = torch.tensor([k for k, number in enumerate(numbers) if number % 3] or [LOCAL])
    texts = [" ".join(WORDS[: 1 + number % 5]) for number in numbers]
    ids = torch.tensor(numbers)
    return Batch(
        images=torch.randn(LOCAL, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        texts={
            "zh": tokenizer.encode(texts),
            "en": tokenizer.encode([texts[row % LOCAL] for row in rows]),
        },
        text_rows={"zh": torch.arange(LOCAL), "en": rows},
        image_ids=ids,
        caption_ids={"zh": ids, "en": ids[rows % LOCAL]},
        uids=tuple(map(str, numbers)),
    )


def train(rank, kind, sharding, *, micro_batches=1, group_size=None):
    """Return the losses and gradient norms of some steps, and the weights that they leave."""
    model = build(kind)
    encoder = model.encoder
    if sharding is None:
        wrapped = nn.parallel.DistributedDataParallel(model)
        no_sync = wrapped.no_sync
    else:
        sharded = ShardedModel(model, encoder.blocks(), sharding, device=CPU)
        wrapped, no_sync = model, sharded.no_sync
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-3, eps=1e-4))
    loss = BilingualLoss(LossPlan(group_size=group_size))
    step = ContrastiveStep(wrapped, loss, no_sync=no_sync)
    seen = []
    for number in range(STEPS):
        output = step(batch_of(rank, number).split(micro_batches))
        norm = clip_gradients(list(model.parameters()), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if number == STEPS // 2:
            with torch.no_grad(), nullcontext() if sharding is None else sharded.gathered():
                encoder.eval()
                for part in range(1 + rank):  # some ranks have more to do than others
                    image = encoder.encode_image(batch_of(part, 0).images)
                encoder.train()
        seen.append(torch.stack([output.loss, norm]))
    moments = OptimizerState(model, optimizer).state_dict()
    return {
        "seen": torch.stack(seen),
        "image": image,  # of the last part
        "weights": {name: whole(each).detach() for name, each in model.state_dict().items()},
        "moments": {name: whole(each).detach() for name, each in moments.items()},
    }


WAYS = {
    "multiway": {
        "full": {"sharding": FULL},
        "full in parts": {"sharding": FULL, "micro_batches": 2},
        "hybrid in groups": {"sharding": HYBRID, "group_size": 2},
        "ddp in groups": {"sharding": None, "group_size": 2},
    },
    "two towers": {
        "kept": {"sharding": KEPT},
        "hybrid in parts": {"sharding": HYBRID, "micro_batches": 2},
    },
    "batch norm": {"full": {"sharding": FULL}},
}


def _train_in_all_ways(rank, kind):
    ways = {"ddp": {"sharding": None}} | WAYS[kind]
    return {name: train(rank, kind, **way) for name, way in ways.items()}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", MODELS)
def test_sharded_weights_learn_what_those_of_ddp_do(kind):
    for found in run_in_world(_train_in_all_ways, WORLD, kind):
        for name, result in found.items():
            expected = found["ddp in groups" if "groups" in name else "ddp"]
            torch.testing.assert_close(result["seen"], expected["seen"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(result["image"], expected["image"], rtol=1e-4, atol=1e-4)
            for part in ("weights", "moments"):
                assert result[part].keys() == expected[part].keys()
                for key, value in expected[part].items():
                    torch.testing.assert_close(result[part][key], value, rtol=1e-4, atol=1e-5)


def _train_blocks_that_are_run_otherwise(rank):
    losses = {}
    changes = {
        "plain": lambda blocks: None,
        "again": recompute,
        "again, but for products": partial(recompute, keep_products=True),
        "compiled": partial(compile_blocks, backend="eager"),
    }
    for name, change in changes.items():
        model = build("two towers")
        change(model.encoder.blocks())
        sharded = ShardedModel(model, model.encoder.blocks(), Sharding(2, 1, True), device=CPU)
        step = ContrastiveStep(model, BilingualLoss(), no_sync=sharded.no_sync)
        step(batch_of(rank, 0).split(2))
        losses[name] = clip_gradients(list(model.parameters()), 1.0)
        losses[f"{name}, then"] = step(batch_of(rank, 1).split(1)).loss
    return losses


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_blocks_may_be_computed_again_or_compiled():
    for found in run_in_world(_train_blocks_that_are_run_otherwise, 2):
        for name, value in found.items():
            assert value == found["plain, then" if "then" in name else "plain"], name


@pytest.fixture
def launched(monkeypatch):
    """Set what `accelerate launch` sets, by the names of its file."""

    def launch(**options):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        for name, value in options.items():
            monkeypatch.setenv(name, value)

    return launch


def in_copies(ranks, copies):
    return {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(ranks),
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(copies),
    }


def test_weights_are_whole_unless_the_launcher_was_asked_to_shard_them(launched):
    assert launched_sharding(8) is None
    launched()
    assert launched_sharding(8) == Sharding(8, 1, True)
    launched(FSDP_RESHARD_AFTER_FORWARD="false", **in_copies(2, 4))
    assert launched_sharding(8) == Sharding(2, 4, False)
    said = "weights sharded over 2 ranks, in 4 copies"
    assert str(Sharding(2, 4, True)) == said
    assert str(Sharding(2, 4, False)) == f"{said}, kept for the backward pass"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version is 1 .*; expected 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is true .*; expected false"),
        (in_copies(3, 2), "dp_shard_size 3 and dp_replicate_size 2; .* number of ranks, 8"),
    ],
)
def test_what_this_does_not_do_is_refused(launched, options, message):
    launched(**options)
    with pytest.raises(ConfigError, match=message):
        launched_sharding(8)


def test_deepspeed_is_refused_before_accelerate_looks_for_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with (
        pytest.raises(ConfigError, match=r"is DEEPSPEED .*; expected FSDP, as in .*zero2"),
        sharding_is_ours(),
    ):
        pass


def test_gradients_are_scaled_down_to_a_norm_and_never_up():
    for largest, scale in ((1.0, 1 / 13), (100.0, 1.0)):
        parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(())),
                      nn.Parameter(torch.zeros(1))]  # fmt: skip
        for parameter, gradient in zip(parameters[:2], ([3.0, 4.0], 12.0), strict=True):
            parameter.grad = torch.tensor(gradient)
        assert clip_gradients(parameters, largest) == 13
        torch.testing.assert_close(parameters[0].grad, scale * torch.tensor([3.0, 4.0]))
        torch.testing.assert_close(parameters[1].grad, torch.tensor(scale * 12))
        assert parameters[2].grad is None
