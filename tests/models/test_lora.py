import sys

import pytest
import torch
from torch import nn

from tests.builders import IMAGE_SIZE, tiny_model, tiny_tokenizer
from tests.models.test_pretraining import TINY_MULTIWAY
from tests.support.processes import run_in_processes
from vlm.distributed.groups import world_group
from vlm.errors import ConfigError
from vlm.models.attention import pack_attention
from vlm.models.batch_norm import synchronize_batch_norm
from vlm.models.build import build_from_config
from vlm.models.lora import add_lora, without_lora

TEXTS = ["red apple", "小狗", "an image of a hot soup"]


def encoder_of(kind, tokenizer):
    if kind == "two towers":
        return tiny_model(tokenizer)
    torch.manual_seed(0)
    return build_from_config(TINY_MULTIWAY, tokenizer).eval()


def features(encoder, tokenizer):
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
    return encoder.encode_text(tokenizer.encode(TEXTS)), encoder.encode_image(images)


def train(encoder, tokenizer):
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    target = torch.randn(encoder.embed_dim, generator=torch.Generator().manual_seed(4))
    for _ in range(3):
        sum((each @ target).sum() for each in features(encoder, tokenizer)).backward()
        optimizer.step()
        optimizer.zero_grad()


class Layers(nn.Module):
    """A linear layer and an attention, of torch or packed."""

    matrices = ("linear.weight", "attention.out_proj.weight", "attention.in_proj_weight")

    def __init__(self, packed):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        if packed:
            pack_attention(self)

    def forward(self, tokens):
        tokens = self.linear(tokens)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


@pytest.mark.parametrize("packed", [False, True])
def test_each_matrix_acts_as_itself_and_a_scaled_product(packed):
    plain, adapted = Layers(packed), Layers(packed)
    add_lora(adapted, [list(adapted.parameters())], rank=2, alpha=6)
    locked = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for seed, matrix in enumerate(trained):
        nn.init.normal_(matrix, generator=torch.Generator().manual_seed(seed))
    for name, a, b in zip(plain.matrices, trained[::2], trained[1::2], strict=True):
        plain.get_parameter(name).data += 3 * (b @ a).detach()
    tokens = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(adapted(tokens), plain(tokens), atol=1e-5, rtol=1e-5)
    after = dict(adapted.named_parameters())
    assert all(torch.equal(after[name], matrix) for name, matrix in locked.items())
    merged = without_lora(adapted)
    for name in plain.matrices:
        torch.testing.assert_close(merged.get_parameter(name).data, plain.get_parameter(name).data)


@pytest.mark.parametrize("kind", ["two towers", "multiway"])
def test_adapters_change_nothing_at_first_and_merge_into_plain_weights(kind):
    tokenizer = tiny_tokenizer()
    encoder = encoder_of(kind, tokenizer)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    plain = features(encoder, tokenizer)
    add_lora(encoder, encoder.text_groups(), rank=2, alpha=4)
    for one, other in zip(features(encoder, tokenizer), plain, strict=True):
        assert torch.equal(one, other)
    train(encoder, tokenizer)
    trained = features(encoder, tokenizer)
    assert (trained[0] - plain[0]).abs().max() > 0.01
    merged = without_lora(encoder)
    for one, other in zip(features(merged, tokenizer), trained, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert merged.state_dict().keys() == before.keys()
    assert any("lora" in name for name in encoder.state_dict())


def test_the_adapted_towers_own_weights_stay_and_other_parameters_train():
    tokenizer = tiny_tokenizer()
    encoder = tiny_model(tokenizer)
    # The parameters themselves are kept, or others could get their addresses.
    own = {parameter: parameter.detach().clone() for parameter in encoder.text.parameters()}
    image = encoder.visual.head.proj.weight.detach().clone()
    add_lora(encoder, encoder.text_groups(), rank=2, alpha=4)
    assert encoder.log_logit_scale.requires_grad
    train(encoder, tokenizer)
    kept = [p for p in encoder.text.parameters() if p in own]
    assert kept
    assert all(torch.equal(p, own[p]) for p in kept)
    assert not torch.equal(encoder.visual.head.proj.weight, image)


def test_a_product_of_rank_two_is_added_to_each_matrix():
    tokenizer = tiny_tokenizer()
    encoder = tiny_model(tokenizer)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    add_lora(encoder, encoder.text_groups(), rank=2, alpha=4)
    train(encoder, tokenizer)
    after = without_lora(encoder).state_dict()
    changed = {
        name: torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3).item()
        for name in before
        if name.startswith("text.") and not torch.equal(after[name], before[name])
    }
    block = "text.transformer.resblocks.0"
    assert changed == dict.fromkeys(
        [
            f"{block}.attn.in_proj_weight",
            f"{block}.attn.out_proj.weight",
            f"{block}.mlp.c_fc.weight",
            f"{block}.mlp.c_proj.weight",
        ],
        2,
    )


def _merge_on_a_rank(rank):
    tokenizer = tiny_tokenizer()
    model = synchronize_batch_norm(tiny_model(tokenizer), world_group(), torch.device("cpu"))
    add_lora(model, model.text_groups(), rank=2, alpha=2)
    tokens = tokenizer.encode(["red apple"])
    merged = without_lora(model.eval())
    assert not any("lora" in name for name in merged.state_dict())
    return (merged.encode_text(tokens) - model.encode_text(tokens)).abs().max()


@pytest.mark.distributed
def test_a_model_whose_batch_norms_span_ranks_is_merged_too():
    assert max(run_in_processes(_merge_on_a_rank, 2)) < 1e-6


def test_a_model_without_adapters_is_returned_as_it_is():
    model = nn.Sequential(nn.Linear(2, 2))
    assert without_lora(model) is model


@pytest.mark.parametrize(("rank", "alpha"), [(0, 4), (2, 0)])
def test_a_rank_or_scale_below_one_is_refused(rank, alpha):
    with pytest.raises(ConfigError, match=f"rank is {rank} and alpha {alpha}"):
        add_lora(nn.Linear(2, 2), [], rank=rank, alpha=alpha)


def test_towers_without_matrices_are_refused():
    norm = nn.LayerNorm(3)
    with pytest.raises(ConfigError, match="no linear layer"):
        add_lora(norm, [list(norm.parameters())], rank=2, alpha=4)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm\[lora\]'"):
        add_lora(nn.Linear(2, 2), [], rank=2, alpha=4)
