from dataclasses import replace
from math import sqrt

import pytest
import torch

from tests.support.naive_multiway import NaiveMultiway
from vlm.errors import ConfigError
from vlm.models.blocks import recompute
from vlm.models.encoder import MAIN, UNIMODAL, Encoder
from vlm.models.multiway import MultiwayEncoder, drop_patches, resized_image_positions
from vlm.models.multiway_config import MultiwayConfig
from vlm.text.tokenizer import TokenBatch

TINY = MultiwayConfig(
    image_size=12,
    patch_size=4,
    width=8,
    heads=2,
    ffn_width=20,
    layers=2,
    vl_layers=2,
    embed_dim=6,
    text_positions=12,
)
VOCABULARY = 11
LENGTHS = (5, 3, 7)


def multiway(config=TINY, **options):
    """Build a model in float64 whose every parameter is random, norms and biases as well."""
    torch.manual_seed(0)
    model = MultiwayEncoder(config, vocab_size=VOCABULARY, **options).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make_images(count=3):
    return torch.randn(
        count, 3, TINY.image_size, TINY.image_size, dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


def texts(padded_to=7):
    ids = torch.zeros(len(LENGTHS), padded_to, dtype=torch.int64)
    mask = torch.zeros(len(LENGTHS), padded_to, dtype=torch.bool)
    generator = torch.Generator().manual_seed(2)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = True
    return TokenBatch(ids, mask)


def gradients(model, *results):
    """Return the gradient of a fixed mixture of results by name; None where there is none."""
    generator = torch.Generator().manual_seed(3)
    mixture = sum(
        (each * torch.randn(each.shape, dtype=each.dtype, generator=generator)).sum()
        for each in results
    )
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(mixture, parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def assert_same_gradients(found, expected):
    zero = torch.zeros(1, dtype=torch.float64)
    assert any(each is not None for each in expected.values())
    for name, reference in expected.items():
        gradient, wanted = (zero if each is None else each for each in (found[name], reference))
        torch.testing.assert_close(*torch.broadcast_tensors(gradient, wanted), rtol=1e-6, atol=1e-9)


def expected_of(kind, model):
    naive, tokens = NaiveMultiway(model.config, dict(model.named_parameters())), texts()
    if kind == "image":
        each = [naive.image(image) for image in make_images()]
    else:
        each = [naive.text(ids[mask]) for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
    main, unimodal, states = zip(*each, strict=True)
    return torch.stack(main), torch.stack(unimodal), torch.cat(states)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_features_are_those_of_a_plain_reading_of_the_forward_pass(kind):
    model = multiway()
    features = (
        model.image_features(make_images()) if kind == "image" else model.text_features(texts())
    )
    main, unimodal, _ = expected_of(kind, model)
    torch.testing.assert_close(features[MAIN], main, rtol=0, atol=1e-6)
    torch.testing.assert_close(features[UNIMODAL], unimodal, rtol=0, atol=1e-6)
    found = gradients(model, features[MAIN], features[UNIMODAL])
    assert_same_gradients(found, gradients(model, main, unimodal))


@pytest.mark.parametrize("kind", ["image", "text"])
def test_states_are_those_of_a_plain_reading_of_the_forward_pass(kind):
    model = multiway()
    states = model.image_states(make_images()) if kind == "image" else model.text_states(texts())
    main, unimodal, tokens = expected_of(kind, model)
    torch.testing.assert_close(states.features[MAIN], main, rtol=0, atol=1e-6)
    torch.testing.assert_close(states.features[UNIMODAL], unimodal, rtol=0, atol=1e-6)
    found = states.tokens.flatten(0, 1) if kind == "image" else states.tokens[states.mask]
    torch.testing.assert_close(found, tokens, rtol=0, atol=1e-6)
    mixed = gradients(model, states.features[MAIN], states.features[UNIMODAL], found)
    assert_same_gradients(mixed, gradients(model, main, unimodal, tokens))


def test_encodings_are_float32_unit_vectors_of_the_main_head():
    model = multiway()
    main = expected_of("image", model)[0]
    expected = (main / main.norm(dim=1, keepdim=True)).float()
    torch.testing.assert_close(model.encode_image(make_images()), expected)
    main = expected_of("text", model)[0]
    expected = (main / main.norm(dim=1, keepdim=True)).float()
    torch.testing.assert_close(model.encode_text(texts()), expected)


def test_a_text_is_the_same_however_far_its_batch_is_padded():
    model = multiway()
    short, long = model.text_states(texts()), model.text_states(texts(padded_to=10))
    torch.testing.assert_close(long.features, short.features, rtol=0, atol=0)
    assert long.tokens.shape[1] == 10
    torch.testing.assert_close(long.tokens[:, : max(LENGTHS)], short.tokens, rtol=0, atol=0)
    assert not long.tokens[~long.mask].any()
    full = model.encode_text(texts(padded_to=TINY.context_length))
    torch.testing.assert_close(full, model.encode_text(texts()), rtol=0, atol=0)


def test_ids_at_padding_change_nothing():
    model, tokens = multiway(), texts()
    others = TokenBatch(tokens.ids.masked_fill(~tokens.mask, VOCABULARY - 1), tokens.mask)
    found, expected = model.text_states(others), model.text_states(tokens)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=0)
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=0)


def test_what_is_hidden_cannot_be_told_and_the_rest_still_counts():
    model, images = multiway(), make_images()
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    hidden[:, 4] = True  # the middle patch
    changed, seen = images.clone(), images.clone()
    changed[:, :, 4:8, 4:8] += 1
    seen[:, :, :4, :4] += 1
    states = model.image_states(images, hidden)
    again = model.image_states(changed, hidden)
    torch.testing.assert_close(again.tokens, states.tokens, rtol=0, atol=0)
    assert not torch.allclose(model.image_states(seen, hidden).tokens, states.tokens)
    assert not torch.allclose(model.image_states(images).tokens, states.tokens)
    unhidden = model.image_states(images, torch.zeros_like(hidden))
    torch.testing.assert_close(unhidden.tokens, model.image_states(images).tokens)
    gradient = gradients(model, states.tokens)["backbone.vision_embed.mask_token"]
    assert gradient.abs().sum() > 0


def test_a_replaced_token_is_read_as_the_vector_in_its_place():
    model, tokens = multiway(), texts(padded_to=10)
    vector = torch.randn(TINY.width, dtype=torch.float64)
    where = torch.zeros_like(tokens.mask)
    where[0, 1] = where[2, 6] = True
    states = model.text_states(tokens, (where, vector))
    # A model whose last id is that vector says the same of texts that hold this id.
    with torch.no_grad():
        model.token_embedding.weight[0] = vector
    expected = model.text_states(TokenBatch(tokens.ids.masked_fill(where, 0), tokens.mask))
    torch.testing.assert_close(states.tokens, expected.tokens)
    torch.testing.assert_close(states.features, expected.features)
    plain = model.text_states(tokens)
    torch.testing.assert_close(states.tokens[1], plain.tokens[1])
    assert not torch.allclose(states.tokens[0], plain.tokens[0])


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(drop_path):
    model = multiway(replace(TINY, drop_path=drop_path)).train()

    def run():
        torch.manual_seed(4)
        image, text = model.image_features(make_images()), model.text_states(texts())
        return gradients(model, *image.values(), *text.features.values(), text.tokens)

    expected = run()
    recompute(model.blocks())
    found = run()
    assert_same_gradients(found, expected)


def test_checkpointing_keeps_fewer_activations():
    model = multiway()

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            model.image_features(make_images())
        return sum(sizes)

    plain = kept()
    recompute(model.blocks())
    assert kept() < plain / 2


def test_stochastic_depth_rises_evenly_over_both_encoders_and_rests_in_evaluation():
    config = replace(TINY, drop_path=0.3)
    model = multiway(config)
    layers = [*model.backbone.encoder.layers, *model.backbone_vl.layers]
    rates = [layer.drop_path.drop_prob for layer in layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    plain = multiway(TINY)
    torch.testing.assert_close(model.encode_image(make_images()), plain.encode_image(make_images()))
    model.train()
    assert not torch.allclose(model.encode_image(make_images()), plain.encode_image(make_images()))


def test_patch_dropout_leaves_out_patches_in_training_only(monkeypatch):
    model = multiway()
    everything = model.encode_image(make_images())
    lengths = []
    model.backbone.encoder.register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    model.set_patch_dropout(0.5)
    torch.testing.assert_close(model.encode_image(make_images()), everything)
    model.train()
    assert not torch.allclose(model.encode_image(make_images()), everything)
    model.image_states(make_images())
    model.image_states(make_images(), torch.ones(3, 9, dtype=torch.bool))
    model.set_patch_dropout(0.0)
    model.encode_image(make_images())
    assert lengths == [10, 1 + 4, 10, 10, 10]


@pytest.mark.parametrize(("share", "kept"), [(0.25, 12), (0.5, 8), (0.99, 1)])
def test_dropped_patches_are_drawn_for_each_image_on_its_own(share, kept):
    torch.manual_seed(5)
    numbers = torch.arange(17.0).expand(64, 17)
    left = drop_patches(numbers[..., None].expand(-1, -1, 2), share)[..., 0]
    assert left.shape == (64, 1 + kept)
    assert (left[:, 0] == 0).all()
    chosen = [frozenset(row.tolist()) for row in left[:, 1:]]
    assert all(len(each) == kept and 0 not in each for each in chosen)
    assert len(set(chosen)) > 10
    assert frozenset.union(*chosen) == frozenset(range(1, 17))


def test_both_temperatures_stay_in_their_bound_and_are_the_heads_own():
    model = MultiwayEncoder(TINY, vocab_size=VOCABULARY, init_logit_scale=100.0)
    with torch.no_grad():
        model.log_logit_scale += 1
        model.log_unimodal_logit_scale += 1
    model.clamp_logit_scale()
    scales = model.logit_scales
    assert list(scales) == [MAIN, UNIMODAL]
    assert all(99.99 < scale <= 100 for scale in scales.values())
    with torch.no_grad():
        model.log_unimodal_logit_scale.zero_()
    assert model.logit_scales[UNIMODAL] == 1
    assert model.logit_scale == model.logit_scales[MAIN] > 99


def test_it_is_an_encoder_with_a_bias_only_where_asked():
    model = multiway(init_logit_bias=-10.0)
    assert isinstance(model, Encoder)
    assert model.logit_bias == -10
    assert multiway().logit_bias is None
    assert (model.embed_dim, model.image_width, model.text_width) == (6, 8, 8)
    assert model.grid_size == (3, 3)


def test_stages_cover_each_side_and_share_the_last_layers():
    model = multiway()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sides = {}
    for kind, branch, stages in (
        ("image", "A", model.image_groups()),
        ("text", "B", model.text_groups()),
    ):
        listed = [[names[id(parameter)] for parameter in stage] for stage in stages]
        assert len(listed) == 1 + TINY.layers + TINY.vl_layers + 1
        assert f"backbone.encoder.embed_positions.{branch}.weight" in listed[0]
        for number, stage in enumerate(listed[1 : 1 + TINY.layers]):
            assert f"backbone.encoder.layers.{number}.ffn.{branch}.fc1.weight" in stage
        assert f"itc_vl_{kind}_proj.fc.weight" in listed[-1]
        sides[kind] = [name for stage in listed for name in stage]
        assert len(set(sides[kind])) == len(sides[kind])
    shared = set(sides["image"]) & set(sides["text"])
    assert shared == {name for name in names.values() if name.startswith("backbone_vl.")}
    scales = {"log_logit_scale", "log_unimodal_logit_scale"}
    assert set(sides["image"]) | set(sides["text"]) == set(names.values()) - scales


def test_what_no_gradient_reaches_is_known():
    model, tokens = multiway(), texts()
    hidden = torch.ones(3, 9, dtype=torch.bool)
    for unimodal, patches in ((True, True), (True, False), (False, True), (False, False)):
        states = model.image_states(make_images(), hidden if patches else None)
        text = model.text_features(tokens)
        heads = [MAIN, UNIMODAL] if unimodal else [MAIN]
        results = [model.logit_scales[head] for head in heads]
        for features in (states.features, text):
            results += [features[head] for head in heads]
        found = gradients(model, states.tokens, *results)
        untrained = model.untrained_parameters(unimodal=unimodal, patches=patches)
        expected = {id(parameter) for parameter in untrained}
        silent = {n: p for n, p in model.named_parameters() if found[n] is None}
        if patches:  # all of them hidden: then the projection is idle instead
            silent = {n: p for n, p in silent.items() if ".proj." not in n}
        assert {id(parameter) for parameter in silent.values()} == expected


def test_weights_start_as_magneto_draws_them():
    config = replace(TINY, width=64, ffn_width=256, layers=5, vl_layers=1)
    torch.manual_seed(0)
    model = MultiwayEncoder(config, vocab_size=VOCABULARY)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert name == "backbone.vision_embed.proj.bias" or not parameter.any()
        if ".layers." in name and parameter.ndim == 2:
            layers = config.vl_layers if "_vl" in name else config.layers
            plain = "q_proj" in name or "k_proj" in name
            gain = 1 if plain else torch.tensor(2 * layers).log().sqrt().item()
            spread = gain * sqrt(2 / sum(parameter.shape))
            assert parameter.std().item() == pytest.approx(spread, rel=0.06), name


def test_inputs_of_a_wrong_size_are_refused():
    model = multiway()
    with pytest.raises(ConfigError, match="16 x 12 pixels; expected 12 x 12"):
        model.encode_image(torch.zeros(1, 3, 12, 16, dtype=torch.float64))
    tokens = TokenBatch(torch.ones(1, 11, dtype=torch.int64), torch.ones(1, 11, dtype=torch.bool))
    with pytest.raises(ConfigError, match="11 tokens; expected at most 10"):
        model.encode_text(tokens)
    for share in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="patch dropout"):
            model.set_patch_dropout(share)


def test_positions_of_another_grid_are_means_over_areas():
    table = torch.arange(3 + 16.0)[:, None].repeat(1, 2)
    smaller = resized_image_positions(table, (2, 2))
    corners = [(0 + 1 + 4 + 5) / 4, (2 + 3 + 6 + 7) / 4, (8 + 9 + 12 + 13) / 4]
    expected = torch.tensor([0, 1, 2, *(3 + each for each in corners), 3 + (10 + 11 + 14 + 15) / 4])
    torch.testing.assert_close(smaller, expected[:, None].repeat(1, 2))
    larger = resized_image_positions(table.half(), (8, 8))
    assert larger.dtype == torch.float16
    squares = larger[3:].view(4, 2, 4, 2, 2)
    torch.testing.assert_close(squares[:, 1, :, 1, 0].flatten(), table[3:, 0].half())
    torch.testing.assert_close(resized_image_positions(table, (4, 4)), table)


def test_a_table_that_is_no_square_grid_is_refused():
    for rows in (3, 2, 3 + 15):
        with pytest.raises(ConfigError, match=f"a table of {rows} image positions"):
            resized_image_positions(torch.zeros(rows, 4), (2, 2))
