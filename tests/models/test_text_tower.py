import open_clip
import pytest
import torch

from tests.builders import tiny_tokenizer
from vlm.errors import ConfigError
from vlm.models.attention import pack_attention
from vlm.models.blocks import recompute
from vlm.models.text_tower import (
    check_reads_to_end_of_text,
    check_text_tower,
    encode_tokens,
    text_blocks,
    text_groups,
    token_states,
)
from vlm.text.tokenizer import TokenBatch

SHORT = ["红苹果", "a very small dog", "old house 老房子", "tea"]
LONG = [*SHORT, "red apple grey cat small dog fast train " * 3]
FULL = [LONG[-1], LONG[-1][4:]]

KINDS = {
    "one layer": {"layers": 1},
    "three layers": {"layers": 3},
    "layer scale": {"ls_init_value": 0.1},
    "custom blocks": {"scale_attn": True},
    "quick gelu": {"quick_gelu": True},
    "no projection": {"proj_type": "none"},
    "pooled at the start": {"pool_type": "first"},
    "causal and pooled at the last position": {"pool_type": "last"},
    "bidirectional": {"no_causal_mask": True},
    "bidirectional with a padding mask": {"no_causal_mask": True, "use_pad_mask": True},
    "bidirectional and pooled at the last position": {
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
    },
    "class token": {"embed_cls": True},
    "class token, custom blocks": {"embed_cls": True, "scale_attn": True},
    "class token with a correct mask": {"embed_cls": True, "correct_cls_mask": True},
    "bidirectional with a class token": {"embed_cls": True, "no_causal_mask": True},
}

kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


def text_tower(tokenizer, **changes):
    torch.manual_seed(0)
    attributes = {k: changes[k] for k in ("correct_cls_mask", "use_pad_mask") if k in changes}
    quick_gelu = changes.get("quick_gelu", False)
    config = {
        "context_length": tokenizer.context_length,
        "vocab_size": tokenizer.vocab_size,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "pool_type": "eos",
        "pad_id": tokenizer.special_ids.padding,
        "eos_id": tokenizer.special_ids.end_of_text,
    } | {k: v for k, v in changes.items() if k not in attributes and k != "quick_gelu"}
    tower = open_clip.CustomTextCLIP(
        32, {"timm_model_name": "test_resnet", "image_size": 32}, config, quick_gelu=quick_gelu
    ).text
    for name, value in attributes.items():  # which no config of open_clip's has
        setattr(tower, name, value)
    with torch.no_grad():  # embeddings so small would hide what attention sees
        for table in (tower.token_embedding.weight, tower.positional_embedding):
            table.mul_(20)
    return tower.double()


def in_full(tokens, tokenizer):
    """Pad to the context, as open_clip's tokenizers do."""
    extra = tokenizer.context_length - tokens.ids.shape[1]
    return torch.nn.functional.pad(tokens.ids, (0, extra), value=tokenizer.special_ids.padding)


def gradients(output, tower):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    parameters = [each for each in tower.parameters() if each.requires_grad]
    return torch.autograd.grad((output * weight).sum(), parameters, materialize_grads=True)


@kinds
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("texts", [SHORT, LONG, FULL], ids=["short", "mixed", "full"])
def test_any_batch_gets_the_features_that_open_clip_gives_to_the_full_context(
    texts, checkpointing, packed, changes
):
    tokenizer = tiny_tokenizer(context_length=24)
    tower = text_tower(tokenizer, **changes)
    tokens = tokenizer.encode(texts)
    assert (tokens.ids.shape[1] < tokenizer.context_length) == (texts == SHORT)
    expected = tower(in_full(tokens, tokenizer))  # open_clip's own pass, before blocks change
    wanted = gradients(expected, tower)
    if packed:
        pack_attention(tower)
    if checkpointing:
        recompute(text_blocks(tower))
    features = encode_tokens(tower, tokens)
    found = gradients(features, tower)
    torch.testing.assert_close(features, expected, rtol=1e-10, atol=1e-12)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


def test_blocks_run_on_tokens_alone_where_texts_differ_in_length():
    tokenizer = tiny_tokenizer(context_length=24)
    tower = text_tower(tokenizer)
    pack_attention(tower)
    seen = []
    tower.transformer.resblocks[0].mlp.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    tokens = tokenizer.encode(LONG)
    encode_tokens(tower, tokens)
    encode_tokens(tower, tokenizer.encode([LONG[0]] * 2))
    width = tower.token_embedding.embedding_dim
    assert seen[0] == (int(tokens.mask.sum()), width)
    assert len(seen[1]) == 3


@kinds
def test_states_of_tokens_are_those_of_open_clip_and_come_with_the_same_features(changes):
    tokenizer = tiny_tokenizer(context_length=24)
    tower = text_tower(tokenizer, **changes)
    tokens = tokenizer.encode(SHORT)
    features, states = token_states(tower, tokens)
    tower.output_tokens = True
    wanted, wanted_states = tower(in_full(tokens, tokenizer))
    if tower.cls_emb is not None:  # open_clip gives them to CoCa's decoder as they are
        wanted_states = tower.ln_final(wanted_states)
    torch.testing.assert_close(features, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(features, encode_tokens(tower, tokens), rtol=1e-10, atol=1e-12)
    wanted_states = wanted_states[:, : tokens.ids.shape[1]]
    assert states.shape == wanted_states.shape
    torch.testing.assert_close(
        states[tokens.mask], wanted_states[tokens.mask], rtol=1e-10, atol=1e-12
    )


@kinds
def test_a_replaced_embedding_is_as_if_the_row_of_the_token_were_another(changes):
    tokenizer = tiny_tokenizer(context_length=24)
    tower = text_tower(tokenizer, **changes)
    tokens = tokenizer.encode(LONG)
    replaced_id = tokens.ids[0, 1]
    where = tokens.ids == replaced_id
    vector = torch.randn(64, dtype=torch.float64, requires_grad=True)
    features, states = token_states(tower, tokens, (where, vector))
    _, before = token_states(tower, tokens)
    with torch.no_grad():
        tower.token_embedding.weight[replaced_id] = vector
    wanted, wanted_states = token_states(tower, tokens)
    torch.testing.assert_close(features, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(states, wanted_states, rtol=1e-10, atol=1e-12)
    assert not torch.isclose(states[0, 1], before[0, 1]).any()
    (found,) = torch.autograd.grad(features.square().sum(), vector)
    row = torch.autograd.grad(wanted.square().sum(), tower.token_embedding.weight)[0][replaced_id]
    torch.testing.assert_close(found, row, rtol=1e-9, atol=1e-11)


@kinds
def test_features_depend_neither_on_the_ids_nor_on_the_length_of_a_batchs_padding(changes):
    tokenizer = tiny_tokenizer(context_length=24)
    tower = text_tower(tokenizer, **changes)
    tokens = tokenizer.encode(SHORT)
    other = TokenBatch(tokens.ids.masked_fill(~tokens.mask, 77), tokens.mask)
    features = encode_tokens(tower, tokens)
    torch.testing.assert_close(encode_tokens(tower, other), features)
    alone = torch.cat([encode_tokens(tower, tokenizer.encode([text])) for text in SHORT])
    torch.testing.assert_close(alone, features)
    longer = tokenizer.encode(SHORT, pad_to=23)
    torch.testing.assert_close(encode_tokens(tower, longer), features)


@kinds
def test_every_weight_is_in_one_group_and_the_last_groups_are_those_that_open_clip_unlocks(changes):
    tower = text_tower(tiny_tokenizer(), **changes)
    groups = text_groups(tower)
    inside = [id(parameter) for group in groups for parameter in group]
    assert sorted(inside) == sorted(id(parameter) for parameter in tower.parameters())
    for unlocked in range(len(groups) + 1):
        tower.lock(unlocked_layers=unlocked)
        trained = {id(parameter) for parameter in tower.parameters() if parameter.requires_grad}
        expected = groups[len(groups) - unlocked :]
        assert trained == {id(parameter) for group in expected for parameter in group}


def test_a_tower_that_gives_a_vector_a_token_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="pools by 'none', which leaves a vector a token"):
        check_text_tower(text_tower(tokenizer, pool_type="none"))
    check_text_tower(text_tower(tokenizer, pool_type="none", embed_cls=True))


@pytest.mark.parametrize(
    "changes",
    [{"no_causal_mask": True}, {"pool_type": "first"}, {"embed_cls": True}],
    ids=["bidirectional", "pooled at the start", "with a class token"],
)
def test_towers_that_see_more_than_a_texts_tokens_in_order_are_told_apart(changes):
    with pytest.raises(ConfigError, match="causal transformer pooled at the end of text"):
        check_reads_to_end_of_text(text_tower(tiny_tokenizer(), **changes))
