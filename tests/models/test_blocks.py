"""Blocks that are computed again or compiled: the same gradients, less memory, the same names."""

import copy
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from benchmarks.meters import TensorMeter
from tests.builders import IMAGE_SIZE, TINY_MODEL, tiny_tokenizer
from tests.models.test_pretraining import TINY_MULTIWAY
from vlm.models.blocks import compile_blocks, recompute
from vlm.models.build import build_from_config
from vlm.models.encoder import MAIN

PATCHES = replace(TINY_MODEL.vision_cfg, timm_model_name="test_vit")
MODELS = {
    "convolutions": TINY_MODEL,
    "transformers": replace(
        TINY_MODEL, vision_cfg=PATCHES, text_cfg=replace(TINY_MODEL.text_cfg, layers=3)
    ),
    "multiway": replace(
        TINY_MULTIWAY, multiway=replace(TINY_MULTIWAY.multiway, layers=2, drop_path=0.4)
    ),
}
WORDS = ["red", "apple", "grey", "cat", "small", "dog", "fast", "train"]


def build(kind):
    torch.manual_seed(0)
    return build_from_config(MODELS[kind], tiny_tokenizer(context_length=32)).train()


def gradients(encoder, *, texts=16, words=3, meter=None):
    """Return the gradients of a step, and the bytes that it keeps after its forward pass."""
    captions = [" ".join(WORDS[:words])] * (texts - 1) + [WORDS[0]]  # with padding, but for 1 word
    tokens = tiny_tokenizer(context_length=32).encode(captions)
    images = torch.randn(16, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    encoder.zero_grad()
    torch.manual_seed(2)  # of stochastic depth
    with meter or nullcontext():
        image, text = encoder.image_features(images)[MAIN], encoder.text_features(tokens)[MAIN]
        kept = meter.live if meter else 0
        (image.square().mean() + text.square().mean()).backward()
    found = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    return found, kept


def measured(encoder):
    """Return the gradients of a step, the bytes kept after its forward pass, and its peak."""
    meter = TensorMeter(*encoder.parameters())
    return *gradients(encoder, meter=meter), meter.peak


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_computing_blocks_again_gives_the_same_gradients_from_less_memory(kind):
    plain = build(kind)
    whole, selective = copy.deepcopy(plain), copy.deepcopy(plain)
    recompute(whole.blocks())
    recompute(selective.blocks(), keep_products=True)
    expected, kept, peak = measured(plain)
    for encoder, kept_ratio in ((whole, 0.85), (selective, 0.95)):
        found, still_kept, still_peak = measured(encoder)
        assert_same(found, expected)
        assert still_kept < kept_ratio * kept
        assert still_peak < peak
    for name, buffer in plain.named_buffers():
        if "num_batches" not in name:  # running statistics see a batch once
            assert torch.equal(buffer, whole.get_buffer(name)), name
            assert torch.equal(buffer, selective.get_buffer(name)), name


def test_a_copy_of_a_block_computes_its_own_weights_again():
    encoder = build("multiway")
    recompute(encoder.blocks())
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert any(gradient.any() for gradient in gradients(encoder)[0].values())
    assert not any(gradient.any() for gradient in gradients(other)[0].values())


quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""torch's compiler looks at it itself."""


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "selective"])
def test_compiled_blocks_take_texts_of_any_length_without_compiling_for_each(again):
    plain = build("transformers")
    encoder, counter = copy.deepcopy(plain), CompileCounter()
    if again:
        recompute(encoder.blocks(), keep_products=True)
    compile_blocks(encoder.blocks(), backend=counter)
    assert list(encoder.state_dict()) == list(plain.state_dict())
    for size in ({"words": 1, "texts": 5}, {"words": 3}, {"words": 2, "texts": 7}):
        assert_same(gradients(encoder, **size)[0], gradients(plain, **size)[0])
    compiled = counter.frame_count
    for words, texts in ((4, 6), (5, 9), (6, 11)):
        gradients(encoder, texts=texts, words=words)
    assert counter.frame_count == compiled > 0


@quiet
@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None,
    reason="torch.compile builds its CPU kernels with g++, which is not installed",
)
def test_blocks_compiled_for_the_machine_give_nearly_the_same_gradients():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU())
    block, inputs = copy.deepcopy(plain), torch.randn(4, 16)
    compile_blocks([block])
    for each in (block, plain):
        each(inputs).square().sum().backward()
    for found, expected in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
