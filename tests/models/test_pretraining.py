from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.builders import IMAGE_SIZE, TINY_MODEL, tiny_model
from vlm.errors import ConfigError
from vlm.models.build import build_from_config
from vlm.models.config import MaskedConfig, ModelConfig
from vlm.models.encoder import MAIN, UNIMODAL
from vlm.models.masked import Hidden, MaskedModelling
from vlm.models.multiway_config import MultiwayConfig
from vlm.models.pretraining import LanguageEmbeddings, PretrainingModel

TINY_MULTIWAY = ModelConfig(
    multiway=MultiwayConfig(
        image_size=IMAGE_SIZE, patch_size=16, width=32, heads=2, ffn_width=64, layers=1,
        vl_layers=1, embed_dim=24, text_positions=34,
    )
)  # fmt: skip


def multiway(tokenizer):
    torch.manual_seed(0)
    return build_from_config(TINY_MULTIWAY, tokenizer).eval()


def hidden(encoder, texts):
    words = {name: tokens.mask & (tokens.ids % 2 == 0) for name, tokens in texts.items()}
    rows, columns = encoder.grid_size
    patches = torch.zeros(3, rows * columns, dtype=torch.bool)
    patches[:, 0] = True
    return Hidden(dict.fromkeys(texts, torch.arange(3)), words, patches)


def test_two_towers_have_one_head_with_the_features_of_inference(tokenizer, batch):
    encoder = tiny_model(tokenizer)
    encoded = PretrainingModel(encoder).eval()(*batch)
    assert list(encoded.heads) == [MAIN]
    assert encoded.others == {}
    head = encoded.heads[MAIN]
    assert torch.equal(head.image, encoder.encode_image(batch[0]))
    for language, tokens in batch[1].items():
        assert torch.equal(head.text[language], encoder.encode_text(tokens))
    assert torch.equal(head.logit_scale, encoder.logit_scale)


def test_multiway_towers_have_a_second_head_with_a_temperature_of_its_own(tokenizer, batch):
    encoder = multiway(tokenizer)
    with torch.no_grad():
        encoder.log_unimodal_logit_scale.fill_(1.0)
    heads = PretrainingModel(encoder).eval()(*batch).heads
    assert list(heads) == [MAIN, UNIMODAL]
    torch.testing.assert_close(heads[MAIN].image, encoder.encode_image(batch[0]))
    second = encoder.image_states(batch[0]).features[UNIMODAL]
    torch.testing.assert_close(heads[UNIMODAL].image, F.normalize(second, dim=-1))
    assert heads[UNIMODAL].logit_scale.item() == pytest.approx(torch.e)
    assert heads[MAIN].logit_scale.item() == pytest.approx(1 / 0.07)


def test_every_heads_texts_are_handed_over_before_the_images_are_encoded(tokenizer, batch):
    encoder = multiway(tokenizer)
    model = PretrainingModel(encoder, matryoshka=[8]).eval()
    texts_only = model(None, batch[1])
    handed = {}

    def send(head, texts):
        assert encoded == []
        handed[head] = texts

    encoded, features = [], encoder.image_features
    encoder.image_features = lambda images: encoded.append(images) or features(images)
    model(*batch, on_texts=send)
    assert len(encoded) == 1
    assert list(handed) == list(texts_only.heads) == [MAIN, "main 8", UNIMODAL]
    for name, head in texts_only.heads.items():
        assert head.image is None
        for language, features in handed[name].items():
            assert torch.equal(features, head.text[language]), name


def test_a_matryoshka_head_is_the_first_numbers_of_a_feature_at_length_one(tokenizer, batch):
    heads = PretrainingModel(tiny_model(tokenizer), matryoshka=[8, 16]).eval()(*batch).heads
    assert list(heads) == [MAIN, "main 8", "main 16"]
    for width in (8, 16):
        expected = F.normalize(heads[MAIN].image[:, :width], dim=-1)
        torch.testing.assert_close(heads[f"main {width}"].image, expected)
        assert torch.equal(heads[f"main {width}"].logit_scale, heads[MAIN].logit_scale)


@pytest.mark.parametrize("width", [0, 32, 100])
def test_a_matryoshka_width_outside_the_features_is_refused(tokenizer, width):
    with pytest.raises(ConfigError, match=rf"width {width}; expected 1 to 31"):
        PretrainingModel(tiny_model(tokenizer), matryoshka=[width])


def test_a_matryoshka_width_that_is_named_twice_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"matryoshka is \[8, 8\]; expected each width once"):
        PretrainingModel(tiny_model(tokenizer), matryoshka=[8, 8])


def test_a_language_is_added_to_its_texts_alone(tokenizer, batch):
    encoder = tiny_model(tokenizer)
    languages = LanguageEmbeddings({"zh": "zh", "zh second": "zh", "en": "en"}, encoder.embed_dim)
    with torch.no_grad():
        languages.vectors.copy_(torch.randn(2, encoder.embed_dim))
    images, texts = batch
    head = PretrainingModel(encoder, languages=languages).eval()(
        images, texts | {"zh second": texts["zh"]}
    ).heads[MAIN]  # fmt: skip
    for row, language in enumerate(texts):
        own = encoder.text_features(texts[language])[MAIN] + languages.vectors[row]
        torch.testing.assert_close(head.text[language], F.normalize(own, dim=-1))
    assert torch.equal(head.text["zh second"], head.text["zh"])
    assert torch.equal(head.image, encoder.encode_image(images))


@pytest.mark.parametrize("kind", ["two towers", "multiway"])
def test_masked_losses_come_with_unchanged_features_and_only_with_a_graph(tokenizer, batch, kind):
    encoder = tiny_model(tokenizer) if kind == "two towers" else multiway(tokenizer)
    config = MaskedConfig(cmlm_weight=1.0, cmim_weight=1.0, decoder_layers=1)
    masked = MaskedModelling(config, encoder, image_size=IMAGE_SIZE)
    model = PretrainingModel(encoder, masked=masked).eval()
    plain = PretrainingModel(encoder).eval()(*batch)
    encoded = model(*batch, hidden=hidden(encoder, batch[1]))
    assert set(encoded.others) == {"cmlm", "cmim"}
    torch.testing.assert_close(encoded.heads[MAIN].image, plain.heads[MAIN].image)
    torch.testing.assert_close(encoded.heads[MAIN].text, plain.heads[MAIN].text)
    with torch.no_grad():
        assert model(*batch, hidden=hidden(encoder, batch[1])).others == {}


@pytest.mark.parametrize("unimodal", [True, False])
@pytest.mark.parametrize("cmim", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["two towers", "multiway"])
def test_every_parameter_that_trains_gets_a_gradient(tokenizer, batch, kind, unimodal, cmim):
    """Else averaging gradients over ranks would wait for ever."""
    encoder = tiny_model(tokenizer) if kind == "two towers" else multiway(tokenizer)
    config = MaskedConfig(cmlm_weight=1.0, cmim_weight=cmim, decoder_layers=1)
    model = PretrainingModel(
        encoder,
        masked=MaskedModelling(config, encoder, image_size=IMAGE_SIZE),
        languages=LanguageEmbeddings({"zh": "zh", "en": "en"}, encoder.embed_dim),
        matryoshka=[8],
        unimodal=unimodal,
    )
    encoded = model(*batch, hidden=hidden(encoder, batch[1]))
    loss = sum(encoded.others.values())
    for head in encoded.heads.values():
        loss = loss + head.logit_scale * sum((head.image @ t.T).sum() for t in head.text.values())
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    locked = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(locked) == (kind == "multiway") * (3 * (not unimodal) + (not cmim))


def test_a_sigmoid_models_bias_reaches_every_head(tokenizer, batch):
    encoder = build_from_config(replace(TINY_MODEL, init_logit_bias=-10.0), tokenizer)
    heads = PretrainingModel(encoder, matryoshka=[8])(*batch).heads
    assert [head.logit_bias.item() for head in heads.values()] == [-10.0, -10.0]


def test_features_without_a_graph_draw_the_random_numbers_of_those_with_one(tokenizer, batch):
    """Micro-batches are encoded twice, and stochastic depth must leave out the same layers."""
    towers = replace(TINY_MULTIWAY.multiway, layers=3, vl_layers=3, drop_path=0.5)
    torch.manual_seed(0)
    encoder = build_from_config(replace(TINY_MULTIWAY, multiway=towers), tokenizer)
    config = MaskedConfig(cmlm_weight=1.0, cmim_weight=1.0, decoder_layers=1)
    masked = MaskedModelling(config, encoder, image_size=IMAGE_SIZE)
    model = PretrainingModel(encoder, masked=masked).train()
    found = []
    for graph in (True, False):
        torch.manual_seed(7)
        with torch.set_grad_enabled(graph):
            found.append(model(*batch, hidden=hidden(encoder, batch[1])).heads[MAIN])
    assert torch.equal(found[0].image.detach(), found[1].image)
    for language in batch[1]:
        assert torch.equal(found[0].text[language].detach(), found[1].text[language])


def test_images_with_hidden_patches_leave_running_statistics_alone(tokenizer, batch):
    found = []
    for cmim in (0.0, 1.0):
        encoder = tiny_model(tokenizer)
        config = MaskedConfig(cmlm_weight=1.0, cmim_weight=cmim, decoder_layers=1)
        masked = MaskedModelling(config, encoder, image_size=IMAGE_SIZE)
        model = PretrainingModel(encoder, masked=masked).train()
        model(*batch, hidden=hidden(encoder, batch[1]))
        found.append({n: b for n, b in encoder.named_buffers() if n.endswith(("mean", "var"))})
    assert found[0]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
