import open_clip
import pytest
import torch

from tests.builders import tiny_tokenizer
from vlm.errors import ConfigError
from vlm.models.text_tower import check_text_tower, encode_tokens
from vlm.text.tokenizer import TokenBatch

TEXTS = ["红苹果", "a very small dog", "old house 老房子", "tea"]


def text_tower(tokenizer, **changes):
    torch.manual_seed(0)
    config = {
        "context_length": tokenizer.context_length,
        "vocab_size": tokenizer.vocab_size,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": tokenizer.special_ids.end_of_text,
    } | changes
    return open_clip.CustomTextCLIP(
        32, {"timm_model_name": "test_resnet", "image_size": 32}, config
    ).text


def pad_to(tokens, length, pad_id):
    extra = length - tokens.ids.shape[1]
    return TokenBatch(
        torch.nn.functional.pad(tokens.ids, (0, extra), value=pad_id),
        torch.nn.functional.pad(tokens.mask, (0, extra), value=False),
    )


@pytest.mark.parametrize(
    "changes",
    [{"layers": 1}, {"layers": 3}, {"ls_init_value": 0.1}, {"scale_attn": True}],
    ids=["one layer", "three layers", "layer scale", "custom blocks"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_short_batches_get_the_features_that_open_clip_gives_to_the_full_context(
    changes, checkpointing
):
    tokenizer = tiny_tokenizer(context_length=24)
    tower = text_tower(tokenizer, **changes).double()
    tower.set_grad_checkpointing(checkpointing)
    tokens = tokenizer.encode(TEXTS)
    assert tokens.ids.shape[1] < tokenizer.context_length
    features = encode_tokens(tower, tokens)
    tower.set_grad_checkpointing(False)  # open_clip cannot run it with every kind of block
    full = pad_to(tokens, tokenizer.context_length, tokenizer.special_ids.padding)
    expected = tower(full.ids)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    parameters = list(tower.parameters())
    found = torch.autograd.grad((features * weight).sum(), parameters)
    wanted = torch.autograd.grad((expected * weight).sum(), parameters)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


def test_a_text_has_the_same_feature_in_every_company():
    tokenizer = tiny_tokenizer()
    tower = text_tower(tokenizer)
    together = encode_tokens(tower, tokenizer.encode(TEXTS))
    alone = torch.cat([encode_tokens(tower, tokenizer.encode([text])) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"no_causal_mask": True}, {"pool_type": "first"}, {"embed_cls": True}],
    ids=["bidirectional", "pooled at the start", "with a class token"],
)
def test_towers_that_would_be_run_wrongly_are_refused(changes):
    with pytest.raises(ConfigError, match="causal transformer pooled at the end of text"):
        check_text_tower(text_tower(tiny_tokenizer(), **changes))
