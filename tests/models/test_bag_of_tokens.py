"""A text tower of 0 layers, compared with the mean written out text by text."""

import pytest
import torch

from tests.builders import tiny_tokenizer
from vlm.errors import ConfigError
from vlm.models.build import build_towers
from vlm.models.text_tower import (
    check_reads_to_end_of_text,
    encode_tokens,
    text_blocks,
    text_groups,
    token_states,
)
from vlm.text.tokenizer import TokenBatch

TEXTS = ["红苹果", "a very small dog", "old house 老房子", ""]
VISION = {"timm_model_name": "test_resnet", "image_size": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def tower(tokenizer):
    torch.manual_seed(0)
    text_cfg = {"layers": 0, "width": 16, "heads": 2, "vocab_size": tokenizer.vocab_size}
    model_cfg = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": text_cfg}
    return build_towers(model_cfg)[1].double()


def written_out(tower, tokens):
    rows = [
        torch.stack([tower.token_embedding.weight[i] for i in ids[mask]]).mean(dim=0)
        for ids, mask in zip(tokens.ids, tokens.mask, strict=True)
    ]
    return torch.stack([tower.text_projection.weight @ row for row in rows])


def test_features_and_gradients_are_those_of_the_projected_mean_of_a_texts_tokens(tower, tokenizer):
    tokens = tokenizer.encode(TEXTS)
    assert not tokens.mask.all()
    found, expected = encode_tokens(tower, tokens), written_out(tower, tokens)
    assert found.shape == (len(TEXTS), 24)
    torch.testing.assert_close(found, expected)
    weights, towards = list(tower.parameters()), torch.randn_like(found)
    for mine, plain in zip(
        torch.autograd.grad((found * towards).sum(), weights),
        torch.autograd.grad((expected * towards).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)


def test_the_order_of_tokens_and_what_is_at_padding_change_nothing(tower, tokenizer):
    tokens = tokenizer.encode(["a very small dog", "tea"])
    changed = tokens.ids.masked_fill(~tokens.mask, 7)
    changed[0] = changed[0].flip(0)
    assert tokens.mask[0].all()
    found = encode_tokens(tower, TokenBatch(changed, tokens.mask))
    torch.testing.assert_close(found, encode_tokens(tower, tokens))


def test_every_weight_is_in_one_group_and_there_are_no_blocks(tower):
    groups = [each for group in text_groups(tower) for each in group]
    assert {id(each) for each in groups} == {id(each) for each in tower.parameters()}
    assert len(groups) == len(list(tower.parameters()))
    assert text_blocks(tower) == []


def test_masked_modelling_and_longer_contexts_refuse_it(tower, tokenizer):
    with pytest.raises(ConfigError, match=r"of 0 layers has no states .* at least 1"):
        token_states(tower, tokenizer.encode(TEXTS))
    with pytest.raises(ConfigError, match="pools by 'BagOfTokens'"):
        check_reads_to_end_of_text(tower)
