"""Masked words are predicted from the image and hidden patches from the text, and nothing leaks."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.cross_decoder import decode
from vlm.errors import ConfigError
from vlm.models import masked
from vlm.models.build import build_encoder
from vlm.models.config import MaskedConfig
from vlm.models.encoder import MAIN, Encoder, States
from vlm.models.masked import Hidden, MaskedModelling, patch_pixels
from vlm.text.tokenizer import TokenBatch, pad

BATCH, SIZE, GRID, WORDS = 3, (8, 12), (2, 3), 20
BOTH = {"cmlm_weight": 1.0, "cmim_weight": 1.0}


class TinyEncoder(Encoder):
    """One layer a side: enough to hide patches and words from."""

    embed_dim, image_width, text_width, grid_size = 4, 12, 16, GRID

    def __init__(self) -> None:
        super().__init__(init_logit_scale=math.e, init_logit_bias=None)
        self.patches = nn.Linear(48, 12)
        self.words = nn.Embedding(WORDS, 16)
        self.hidden_patch = nn.Parameter(torch.randn(12))
        self.image_positions = nn.Parameter(torch.randn(6, 12))
        self.text_positions = nn.Parameter(torch.randn(30, 16))
        options = {"dropout": 0.0, "batch_first": True}
        self.image_layer = nn.TransformerEncoderLayer(12, 2, 24, **options)
        self.text_layer = nn.TransformerEncoderLayer(16, 2, 32, **options)

    @property
    def token_embedding(self):
        return self.words

    def image_states(self, images, hidden=None):
        states = self.patches(patch_pixels(images, GRID))
        if hidden is not None:
            states = torch.where(hidden[..., None], self.hidden_patch, states)
        states = self.image_layer(states + self.image_positions)
        return States({MAIN: states[:, 0, :4]}, states, None)

    def text_states(self, tokens, replaced=None):
        states = self.words(tokens.ids)
        if replaced is not None:
            states = torch.where(replaced[0][..., None], replaced[1], states)
        states = states + self.text_positions[: states.shape[1]]
        states = self.text_layer(states, src_key_padding_mask=~tokens.mask)
        return States({MAIN: states[:, 0, :4]}, states, tokens.mask)

    def _not_needed(self, *_, **__):
        raise AssertionError

    image_features = text_features = image_groups = text_groups = _not_needed
    blocks = set_patch_dropout = _not_needed


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TinyEncoder().double()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(BATCH, 3, *SIZE).double().requires_grad_()


@pytest.fixture
def texts():
    return {
        "zh": pad([[1, 5, 6, 7, 2], [1, 8, 2], [1, 2]], 0),
        "en": pad([[1, 9, 2], [1, 10, 11, 12, 13, 2], [1, 14, 15, 2]], 0),
    }


ROWS = {"zh": torch.arange(BATCH), "en": torch.arange(BATCH)}


@pytest.fixture
def hidden():
    zh, en = torch.zeros(BATCH, 5, dtype=torch.bool), torch.zeros(BATCH, 6, dtype=torch.bool)
    zh[0, [1, 3]] = en[0, 1] = en[1, [2, 3]] = en[2, 2] = True
    patches = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]).bool()
    return Hidden(ROWS, {"zh": zh, "en": en}, patches)


def modelling(encoder, *, teacher_width=None, **options) -> MaskedModelling:
    torch.manual_seed(2)
    config = MaskedConfig(**({"decoder_layers": 1, "decoder_width": 8} | BOTH | options))
    module = MaskedModelling(config, encoder, image_size=SIZE, teacher_width=teacher_width)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double()


def losses_of(module, encoder, images, texts, hidden, teacher_tokens=None):
    text_states = {language: encoder.text_states(tokens) for language, tokens in texts.items()}
    return module(
        encoder, images, encoder.image_states(images), texts, text_states, hidden, teacher_tokens
    )


def words_by_definition(module, encoder, images, texts, hidden):
    """Go from text to text and from word to word."""
    keys, losses = encoder.image_states(images).tokens, []
    seen = torch.ones(keys.shape[:2], dtype=torch.bool)
    for language, tokens in texts.items():
        states = encoder.text_states(tokens, (hidden.words[language], module.mask_vector)).tokens
        for row, column in hidden.words[language].nonzero().tolist():
            one, image = slice(row, row + 1), hidden.rows[language][row : row + 1]
            decoded = decode(
                module.image_to_text, states[one], keys[image], tokens.mask[one], seen[image]
            )
            x = decoded[0, column]
            linear, _, norm = module.word_head.layer
            x = norm(F.gelu(F.linear(x, linear.weight, linear.bias)))
            logits = encoder.token_embedding.weight @ x + module.word_head.bias
            losses.append(logits.logsumexp(0) - logits[tokens.ids[row, column]])
    return torch.stack(losses).mean()


def patches_by_definition(module, encoder, images, texts, hidden, teacher_tokens=None):
    """Go from image to image and from patch to patch."""
    queries = encoder.image_states(images, hidden.patches).tokens
    captions = [
        (image, states.tokens[row][states.mask[row]])
        for language, states in ((name, encoder.text_states(each)) for name, each in texts.items())
        for row, image in enumerate(hidden.rows[language].tolist())
    ]
    losses = []
    for row, patch in hidden.patches.nonzero().tolist():
        keys = torch.cat([states for image, states in captions if image == row])[None]
        everything = (torch.ones(1, each.shape[1]).bool() for each in (queries, keys))
        x = decode(module.text_to_image, queries[row : row + 1], keys, *everything)[0, patch]
        told = module.patch_head(x)
        if teacher_tokens is None:
            top, left = patch // 3 * 4, patch % 3 * 4
            truth = images[row, :, top : top + 4, left : left + 4].flatten().detach()
        else:
            truth = teacher_tokens[row, patch].detach()
        truth = (truth - truth.mean()) / (truth.var(correction=0) + 1e-6).sqrt()
        # Targets are read in single precision.
        error = (told.float() - truth.float()).abs()
        small = torch.where(error < 1, error**2 / 2, error - 0.5)
        losses.append((error**2 if teacher_tokens is None else small).mean())
    return torch.stack(losses).mean()


def agree(loss, expected, encoder, module):
    parameters = [*encoder.parameters(), *module.parameters()]
    torch.testing.assert_close(loss, expected, check_dtype=False)
    ours, theirs = (
        torch.autograd.grad(each, parameters, allow_unused=True, materialize_grads=True)
        for each in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_loss_of_words_is_their_mean_cross_entropy(encoder, images, texts, hidden):
    module = modelling(encoder)
    loss = losses_of(module, encoder, images, texts, hidden)["cmlm"]
    agree(loss, words_by_definition(module, encoder, images, texts, hidden), encoder, module)


def test_the_loss_of_words_in_parts_is_the_same(encoder, images, texts, hidden, monkeypatch):
    monkeypatch.setattr(masked, "_ROWS_AT_ONCE", 4)
    module = modelling(encoder)
    loss = losses_of(module, encoder, images, texts, hidden)["cmlm"]
    agree(loss, words_by_definition(module, encoder, images, texts, hidden), encoder, module)


def test_the_loss_of_patches_is_the_error_of_normalised_pixels(encoder, images, texts, hidden):
    module = modelling(encoder)
    loss = losses_of(module, encoder, images, texts, hidden)["cmim"]
    agree(loss, patches_by_definition(module, encoder, images, texts, hidden), encoder, module)


def test_a_teachers_states_take_the_place_of_pixels(encoder, images, texts, hidden):
    module = modelling(encoder, teacher_width=5)
    teacher = 3 * torch.randn(BATCH, 6, 5).double() + 1
    loss = losses_of(module, encoder, images, texts, hidden, teacher)["cmim"]
    expected = patches_by_definition(module, encoder, images, texts, hidden, teacher)
    agree(loss, expected, encoder, module)


def test_only_what_is_hidden_counts(encoder, images, texts, hidden):
    zh = Hidden(ROWS, {"zh": hidden.words["zh"], "en": torch.zeros_like(hidden.words["en"])})
    words = modelling(encoder, cmim_weight=0.0)
    alone = losses_of(words, encoder, images, {"zh": texts["zh"]}, zh)
    assert losses_of(words, encoder, images, texts, zh) == alone
    # Each language by its number of words: two and four.
    both = losses_of(words, encoder, images, texts, hidden)["cmlm"]
    en = Hidden(ROWS, {"en": hidden.words["en"]})
    other = losses_of(words, encoder, images, {"en": texts["en"]}, en)["cmlm"]
    torch.testing.assert_close(both, (2 * alone["cmlm"] + 4 * other) / 6)


def test_each_side_learns_from_the_others_loss(encoder, images, texts, hidden):
    losses = losses_of(modelling(encoder), encoder, images, texts, hidden)
    sides = {
        "cmlm": [*encoder.patches.parameters(), *encoder.image_layer.parameters()],
        "cmim": [encoder.token_embedding.weight, *encoder.text_layer.parameters()],
    }
    for name, parameters in sides.items():
        gradients = torch.autograd.grad(losses[name], parameters, retain_graph=True)
        assert all(gradient.norm() > 1e-6 for gradient in gradients)


def some_of(texts, hidden, there):
    """Return the captions of some images alone, and what is hidden of them."""
    rows = {language: torch.tensor(of) for language, of in there.items()}
    words = {language: hidden.words[language][of] for language, of in rows.items()}
    chosen = {
        language: TokenBatch(texts[language].ids[of], texts[language].mask[of])
        for language, of in rows.items()
    }
    return chosen, Hidden(rows, words, hidden.patches)


@pytest.mark.parametrize(
    "there",
    [
        {"zh": [0, 1], "en": [1, 2]},
        {"zh": [2, 0], "en": [1]},
        {"zh": [0, 1, 2], "en": [2]},
    ],
    ids=["both of one image", "one of each", "one language of most"],
)
def test_images_that_lack_a_caption_are_read_with_those_they_have(
    encoder, images, texts, hidden, there
):
    texts, hidden = some_of(texts, hidden, there)
    module = modelling(encoder)
    losses = losses_of(module, encoder, images, texts, hidden)
    words = words_by_definition(module, encoder, images, texts, hidden)
    patches = patches_by_definition(module, encoder, images, texts, hidden)
    agree(sum(losses.values()), words + patches, encoder, module)


def test_a_text_of_no_image_stands_for_a_language_that_no_image_has(encoder, images, texts, hidden):
    module = modelling(encoder)
    some, hides = some_of(texts, hidden, {"zh": [0, 1, 2], "en": [0]})
    past = torch.tensor([BATCH])
    words = hides.words | {"en": torch.zeros_like(hides.words["en"])}
    losses = losses_of(
        module, encoder, images, some, Hidden(hides.rows | {"en": past}, words, hides.patches)
    )
    expected = losses_of(module, encoder, images, {"zh": some["zh"]}, hides)
    agree(sum(losses.values()), sum(expected.values()), encoder, module)


def test_padding_changes_nothing(encoder, images, texts, hidden):
    module = modelling(encoder)
    losses = losses_of(module, encoder, images, texts, hidden)
    longer = {
        language: TokenBatch(F.pad(tokens.ids, (0, 4), value=17), F.pad(tokens.mask, (0, 4)))
        for language, tokens in texts.items()
    }
    words = {language: F.pad(mask, (0, 4)) for language, mask in hidden.words.items()}
    again = losses_of(module, encoder, images, longer, Hidden(ROWS, words, hidden.patches))
    torch.testing.assert_close(again, losses)


def told(module, head, *arguments):
    """Return what a head is given: the states of what is hidden."""
    kept = []
    handle = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    losses_of(module, *arguments)
    handle.remove()
    return kept[0]


def test_what_is_told_of_a_hidden_patch_does_not_depend_on_its_pixels(
    encoder, images, texts, hidden
):
    module = modelling(encoder)
    before = told(module, module.patch_head, encoder, images, texts, hidden)
    cells = hidden.patches.view(BATCH, 1, *GRID)
    where = cells.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    changed = torch.where(where, images + torch.randn_like(images), images)
    torch.testing.assert_close(
        told(module, module.patch_head, encoder, changed, texts, hidden), before
    )
    others = torch.where(where, images, images + 1)
    seen = told(module, module.patch_head, encoder, others, texts, hidden)
    assert ((seen - before).abs().amax(1) > 1e-4).all()


def test_what_is_told_of_a_masked_word_does_not_depend_on_it(encoder, images, texts, hidden):
    module = modelling(encoder)
    before = told(module, module.word_head, encoder, images, texts, hidden)
    changed = {
        language: TokenBatch(
            torch.where(hidden.words[language], 19 - tokens.ids, tokens.ids), tokens.mask
        )
        for language, tokens in texts.items()
    }
    torch.testing.assert_close(
        told(module, module.word_head, encoder, images, changed, hidden), before
    )
    others = told(module, module.word_head, encoder, images + 1, texts, hidden)
    assert ((others - before).abs().amax(1) > 1e-4).all()


TOWERS = {
    "two towers": {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 12, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8,
        },
        "text_cfg": {
            "context_length": 8, "vocab_size": WORDS, "width": 24, "heads": 2, "layers": 1,
            "pool_type": "eos", "pad_id": 0, "eos_id": 2,
        },
        "custom_text": True,
    },
    "multiway": {
        "multiway": {
            "image_size": 12, "patch_size": 4, "width": 16, "heads": 2, "ffn_width": 32,
            "layers": 1, "vl_layers": 1, "embed_dim": 8, "text_positions": 10,
        },
        "vocab_size": WORDS,
    },
}  # fmt: skip


@pytest.mark.parametrize("towers", TOWERS.values(), ids=TOWERS)
@pytest.mark.slow
def test_the_packages_encoders_learn_to_tell_what_they_cannot_see(towers):
    torch.manual_seed(0)
    encoder = build_encoder(towers)
    module = MaskedModelling(MaskedConfig(**BOTH), encoder, image_size=12)
    images = torch.randn(4, 3, 12, 12)
    texts = {"zh": pad([[1, 4 + n, 8 + n, 2] for n in range(4)], 0)}
    words = {"zh": torch.tensor([[False, True, False, False]] * 4)}
    hidden = Hidden({"zh": torch.arange(4)}, words, torch.eye(4, 9, dtype=torch.bool))

    def all_losses(images, texts):
        return losses_of(module, encoder, images, texts, hidden)

    cells = hidden.patches.view(4, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    arguments = (encoder, torch.where(cells, images + 9, images), texts, hidden)
    torch.testing.assert_close(
        told(module, module.patch_head, *arguments),
        told(module, module.patch_head, encoder, images, texts, hidden),
    )
    optimizer = torch.optim.Adam([*encoder.parameters(), *module.parameters()], lr=3e-3)
    first = all_losses(images, texts)
    for _ in range(60):
        optimizer.zero_grad()
        sum(all_losses(images, texts).values()).backward()
        optimizer.step()
    last = all_losses(images, texts)
    assert all(last[name] < 0.3 * first[name] for name in ("cmlm", "cmim"))


def test_where_nothing_is_hidden_losses_are_zero_and_reach_every_parameter(
    encoder, images, texts, hidden
):
    nothing = Hidden(
        ROWS,
        {language: torch.zeros_like(mask) for language, mask in hidden.words.items()},
        torch.zeros_like(hidden.patches),
    )
    module = modelling(encoder)
    losses = losses_of(module, encoder, images, texts, nothing)
    assert losses == {"cmlm": 0.0, "cmim": 0.0}
    parameters = [*module.parameters(), *encoder.image_layer.parameters()]
    gradients = torch.autograd.grad(sum(losses.values()), parameters)  # refuses what is unused
    assert not any(gradient.any() for gradient in gradients)


def test_every_parameter_of_the_module_is_trained(encoder, images, texts, hidden):
    module = modelling(encoder)
    sum(losses_of(module, encoder, images, texts, hidden).values()).backward()
    # Attention does not change when all keys move alike: the bias of keys has no gradient.
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert all(p.grad.norm() > 0 for n, p in module.named_parameters() if "in_proj_bias" not in n)


def test_an_image_without_text_has_a_loss_of_its_own(encoder, images, texts, hidden):
    module = modelling(encoder, cmlm_weight=0.0)
    zh = TokenBatch(texts["zh"].ids[[0, 2]], texts["zh"].mask[[0, 2]])
    text_states = {"zh": encoder.text_states(zh)}
    states = encoder.image_states(images)
    patches = torch.tensor([[False] * 6, [True] * 3 + [False] * 3, [False] * 6])
    hides = Hidden({"zh": torch.tensor([0, 2])}, {}, patches)
    loss = module(encoder, images, states, {"zh": zh}, text_states, hides)["cmim"]
    assert loss.isfinite()
    gradients = torch.autograd.grad(
        loss, [*module.parameters(), encoder.token_embedding.weight], allow_unused=True
    )
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert not gradients[-1].any()


@pytest.mark.parametrize("name", ["cmlm", "cmim"])
def test_what_is_off_has_no_parts_and_no_loss(name, encoder, images, texts, hidden):
    other = {"cmlm": "cmim", "cmim": "cmlm"}[name]
    module = modelling(encoder, **{f"{other}_weight": 0.0})
    assert [*losses_of(module, encoder, images, texts, hidden)] == [name]
    assert module.hides_patches == (name == "cmim")
    sum(losses_of(module, encoder, images, texts, hidden).values()).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert {*MaskedConfig(**BOTH | {f"{other}_weight": 0.0}).weights} == {name}


def test_mixed_precision_is_near_single_precision(encoder, images, texts, hidden):
    encoder, images = encoder.float(), images.detach().float()
    module = modelling(encoder).float()
    exact = losses_of(module, encoder, images, texts, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses_of(module, encoder, images, texts, hidden)
    for name, loss in mixed.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.03, atol=0.03)


def test_patches_are_the_cells_of_a_grid_row_by_row():
    images = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    cells = patch_pixels(images, (2, 3))
    assert cells.shape == (2, 6, 12)
    for patch in range(6):
        top, left = patch // 3 * 2, patch % 3 * 2
        assert cells[:, patch].equal(images[:, :, top : top + 2, left : left + 2].flatten(1))


def test_images_that_the_grid_does_not_divide_are_refused(encoder):
    config = MaskedConfig(**BOTH)
    with pytest.raises(ConfigError, match="9 x 9 pixels cannot be divided into the 2 x 3 patches"):
        MaskedModelling(config, encoder, image_size=9)
    MaskedModelling(config, encoder, image_size=9, teacher_width=7)  # needs no pixels


def test_images_and_teachers_of_other_sizes_are_refused(encoder, images, texts, hidden):
    larger = MaskedModelling(MaskedConfig(**BOTH), encoder, image_size=(16, 24)).double()
    with pytest.raises(ConfigError, match="6 patches of 48 numbers to predict; expected 6 of 192"):
        losses_of(larger, encoder, images, texts, hidden)
    with pytest.raises(ConfigError, match="9 patches of 5 numbers to predict; expected 6 of 5"):
        losses_of(
            modelling(encoder, teacher_width=5), encoder, images, texts, hidden,
            torch.zeros(BATCH, 9, 5).double(),
        )  # fmt: skip


def test_masked_modelling_with_nothing_on_is_refused(encoder):
    with pytest.raises(ConfigError, match="expected one of them above 0"):
        MaskedModelling(MaskedConfig(teacher=Path("teacher")), encoder, image_size=SIZE)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("cmlm_weight", -0.1),
        ("cmim_weight", math.inf),
        ("cmim_weight", math.nan),
        ("text_ratio", 0.0),
        ("text_ratio", 1.1),
        ("image_ratio", 0.0),
        ("image_ratio", 1.0),
        ("decoder_layers", 0),
        ("decoder_width", 0),
        ("decoder_heads", -1),
    ],
)
def test_settings_out_of_range_are_refused(name, wrong):
    with pytest.raises(ConfigError, match=f"{name} is {wrong}; expected"):
        MaskedConfig(**{name: wrong})
