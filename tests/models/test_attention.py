"""Packed attention against torch's own, values and gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.builders import tiny_tokenizer
from vlm.models.attention import PackedAttention, pack_attention
from vlm.models.build import build_from_config
from vlm.models.config import ModelConfig


def both(**settings: object) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64, **settings)
    nn.init.normal_(plain.in_proj_bias) if plain.in_proj_bias is not None else None
    packed = nn.ModuleList([copy.deepcopy(plain)])
    pack_attention(packed)
    return plain, packed[0]


def causal(length: int) -> Tensor:
    return torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)


def hidden(texts: int, queries: int, keys: int, *, heads: int) -> Tensor:
    """Hide the last keys of each text, fewer of each next one."""
    lengths = keys - torch.arange(texts) % keys
    mask = torch.arange(keys) >= lengths[:, None, None]
    return mask.expand(texts, queries, keys).repeat_interleave(heads, dim=0)


@pytest.mark.parametrize(
    ("queries", "mask"),
    [
        (5, None),
        (5, causal(5)),
        (5, hidden(4, 5, 5, heads=3)),
        (5, hidden(4, 5, 5, heads=3).double() * -1e9),
        (1, hidden(4, 1, 5, heads=3)),
    ],
    ids=["all", "causal", "hidden", "added", "one query"],
)
def test_values_and_gradients_are_those_of_torchs_module(queries: int, mask: Tensor | None) -> None:
    found = []
    for module in both():
        torch.manual_seed(1)
        keys = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
        query = keys if queries == 5 else keys[:, :queries] * 2
        output, weights = module(query, keys, keys, attn_mask=mask, need_weights=False)
        assert weights is None
        (output * torch.arange(12)).sum().backward()
        found.append([output, keys.grad, *(each.grad for each in module.parameters())])
    for plain, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-12, atol=1e-12)


def test_what_open_clip_does_not_ask_for_is_left_to_torch() -> None:
    plain, packed = both()
    states = torch.randn(4, 5, 12, dtype=torch.float64)
    padding = torch.arange(5) > torch.tensor([[4], [3], [2], [1]])
    for given in ({"key_padding_mask": padding}, {"average_attn_weights": False}):
        for one, other in zip(
            plain(states, states, states, **given),
            packed(states, states, states, **given),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("settings", [{"kdim": 8}, {"add_zero_attn": True}, {"bias": False}])
def test_other_attention_stays_as_it_is(settings: dict[str, object]) -> None:
    assert type(both(**settings)[1]) is nn.MultiheadAttention


def test_both_towers_of_open_clip_run_packed() -> None:
    model = build_from_config(ModelConfig(open_clip="ViT-S-32-alt"), tiny_tokenizer())
    found = [type(each) for each in model.modules() if isinstance(each, nn.MultiheadAttention)]
    assert len(found) == 22
    assert set(found) == {PackedAttention}
