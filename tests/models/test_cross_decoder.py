"""The decoder is a pre-LN transformer over two sides, and padding is not there for it."""

import pytest
import torch

from tests.support.cross_decoder import decode
from vlm.errors import ConfigError
from vlm.models.masked import CrossDecoder


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    decoder = CrossDecoder(6, 10, width=16, heads=4, layers=3).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.fixture
def sides():
    torch.manual_seed(1)
    queries, keys = torch.randn(3, 5, 6).double(), torch.randn(3, 7, 10).double()
    query_mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    key_mask = torch.rand(3, 7) < 0.5
    key_mask[:, 2] = True
    return queries.requires_grad_(), keys.requires_grad_(), query_mask, key_mask


def test_the_decoder_is_a_transformer_of_two_sides(decoder, sides):
    queries, keys, query_mask, key_mask = sides
    inputs = [queries, keys, *decoder.parameters()]
    decoded = decoder(queries, keys, query_mask=query_mask, key_mask=key_mask)[query_mask]
    expected = decode(decoder, queries, keys, query_mask, key_mask)[query_mask]
    torch.testing.assert_close(decoded, expected)
    towards = torch.randn_like(decoded)
    ours = torch.autograd.grad((decoded * towards).sum(), inputs)
    theirs = torch.autograd.grad((expected * towards).sum(), inputs)
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.abs().sum() > 1e-6 for gradient in ours)


def test_without_masks_all_is_seen(decoder, sides):
    queries, keys, *_ = sides
    everything = torch.ones(3, 5, dtype=torch.bool), torch.ones(3, 7, dtype=torch.bool)
    decoded = decoder(queries, keys)
    torch.testing.assert_close(decoded, decode(decoder, queries, keys, *everything))


def test_what_is_at_padding_does_not_matter(decoder, sides):
    queries, keys, query_mask, key_mask = sides
    masks = {"query_mask": query_mask, "key_mask": key_mask}
    first = decoder(queries, keys, **masks)[query_mask]
    with torch.no_grad():
        queries[~query_mask] += 3
        keys[~key_mask] -= 3
    torch.testing.assert_close(decoder(queries, keys, **masks)[query_mask], first)


def test_a_row_that_can_look_nowhere_is_finite_and_learns_nothing_from_the_other_side(
    decoder, sides
):
    queries, keys, query_mask, key_mask = sides
    key_mask[1] = query_mask[2] = False
    masks = {"query_mask": query_mask, "key_mask": key_mask}
    decoded = decoder(queries, keys, **masks)
    assert decoded.isfinite().all()
    gradients = torch.autograd.grad(decoded.square().sum(), [queries, keys, *decoder.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][1].any()
    assert gradients[1][0].any()
    with torch.no_grad():
        keys[1] += 5
    torch.testing.assert_close(decoder(queries, keys, **masks)[1], decoded[1])


def test_layers_start_different():
    first, second = CrossDecoder(8, 8, layers=2).layers
    assert not first.linear1.weight.equal(second.linear1.weight)


@pytest.mark.parametrize(
    ("query_width", "options", "width", "heads"),
    [
        (192, {}, 192, 3),
        (32, {}, 32, 1),
        (100, {}, 100, 1),
        (32, {"width": 128}, 128, 2),
        (32, {"heads": 8}, 32, 8),
    ],
)
def test_width_and_heads_follow_from_the_states(query_width, options, width, heads):
    decoder = CrossDecoder(query_width, 24, layers=1, **options)
    assert decoder.width == width
    assert decoder.layers[0].self_attn.num_heads == heads
    assert decoder(torch.randn(2, 3, query_width), torch.randn(2, 4, 24)).shape == (2, 3, width)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="decoder_heads is 3; expected a divisor of the width 32"):
        CrossDecoder(32, 32, heads=3)
