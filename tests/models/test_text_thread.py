"""Towers that run at once give what they give one after the other, whatever the threads do."""

import threading
import time

import pytest
import torch
from torch import nn

from tests.builders import IMAGE_SIZE, tiny_model
from tests.models.test_pretraining import TINY_MULTIWAY
from vlm.errors import ConfigError
from vlm.models.build import build_from_config
from vlm.models.config import MaskedConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.models.masked import MaskedModelling
from vlm.models.pretraining import PretrainingModel
from vlm.models.text_thread import TextThread


def model_of(tokenizer, *, threaded, **options):
    encoder = tiny_model(tokenizer)
    thread = TextThread(encoder) if threaded else None
    return PretrainingModel(encoder, text_thread=thread, **options).train()


def step(model, batch):
    """Return everything that a step computes: features of every head, and gradients."""
    encoded = model(*batch)
    found = {}
    for name, head in encoded.heads.items():
        found |= {f"{name} image": head.image}
        found |= {f"{name} {language}": text for language, text in head.text.items()}
    pairs = sum(
        (head.logit_scale * head.image @ text.T).logsumexp(1).sum()
        for head in encoded.heads.values()
        for text in head.text.values()
    )
    pairs.backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    return {name: each.detach() for name, each in found.items()}, gradients


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert (one[name] is None) == (value is None), name
            assert value is None or torch.equal(one[name], value), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("options", [{}, {"matryoshka": (8, 16)}], ids=["one head", "three heads"])
def test_features_and_gradients_are_those_of_one_tower_after_the_other(
    tokenizer, batch, bf16, options
):
    with torch.autocast("cpu", enabled=bf16):
        found, expected = (
            step(model_of(tokenizer, threaded=threaded, **options), batch)
            for threaded in (True, False)
        )
    assert_same(found, expected)


def test_gradients_add_up_over_steps(tokenizer, batch):
    threaded, plain = (model_of(tokenizer, threaded=threaded) for threaded in (True, False))
    for _ in range(5):
        assert_same(step(threaded, batch), step(plain, batch))


def test_a_locked_text_tower_gets_no_gradient(tokenizer, batch):
    threaded, plain = (model_of(tokenizer, threaded=threaded) for threaded in (True, False))
    for model in (threaded, plain):
        model.encoder.text.requires_grad_(False)
    found = step(threaded, batch)
    assert_same(found, step(plain, batch))
    assert all(each.grad is None for each in threaded.encoder.text.parameters())


def test_without_gradients_no_graph_is_kept(tokenizer, batch):
    with torch.no_grad():
        head = model_of(tokenizer, threaded=True)(*batch).heads["main"]
    assert not any(text.requires_grad for text in head.text.values())


class Meeting(nn.Module):
    """Waits in both passes until the other tower's is there too: one after the other fails."""

    def __init__(self, meeting: threading.Barrier) -> None:
        super().__init__()
        self.meeting = meeting

    def meet(self, *_: torch.Tensor) -> None:
        self.meeting.wait(timeout=20)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.meet()
        values = values * 1
        values.register_hook(self.meet)
        return values


def test_the_towers_run_at_once_in_both_passes(tokenizer, batch, monkeypatch):
    meetings = Meeting(threading.Barrier(2))
    for name in ("text_features", "image_features"):
        original = getattr(DualEncoder, name)
        monkeypatch.setattr(
            DualEncoder,
            name,
            lambda self, inputs, original=original: {
                head: meetings(each) for head, each in original(self, inputs).items()
            },
        )
    images, texts = batch
    step(model_of(tokenizer, threaded=True), (images, {"en": texts["en"]}))


@pytest.mark.parametrize("backward", [False, True])
def test_what_fails_in_the_thread_fails_the_step(tokenizer, batch, backward, monkeypatch):
    original = DualEncoder.text_features

    def fail(*_):
        time.sleep(0.1)  # the image tower is done by then
        raise MemoryError("no room for texts")

    def failing(self, tokens):
        features = original(self, tokens)
        if not backward:
            fail()
        features["main"].register_hook(fail)
        return features

    monkeypatch.setattr(DualEncoder, "text_features", failing)
    with pytest.raises(MemoryError, match="no room for texts"):
        step(model_of(tokenizer, threaded=True), batch)


def test_texts_are_computed_with_as_many_threads_as_images(tokenizer, batch, monkeypatch):
    numbers, original = [], DualEncoder.text_features
    monkeypatch.setattr(
        DualEncoder,
        "text_features",
        lambda *inputs: numbers.append(torch.get_num_threads()) or original(*inputs),
    )
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model_of(tokenizer, threaded=True)(*batch)
    torch.set_num_threads(before)
    assert numbers == [1, 1, 2, 2]


def test_towers_that_draw_random_numbers_are_refused(tokenizer, batch, monkeypatch):
    original = DualEncoder.image_features
    monkeypatch.setattr(
        DualEncoder,
        "image_features",
        lambda self, images: original(self, nn.functional.dropout(images, 0.1)),
    )
    with pytest.raises(ConfigError, match="parallel_towers is true, but the towers draw random"):
        model_of(tokenizer, threaded=True)(*batch)


def test_towers_that_share_layers_are_refused(tokenizer):
    encoder = build_from_config(TINY_MULTIWAY, tokenizer)
    with pytest.raises(ConfigError, match="towers of a MultiwayEncoder share layers"):
        TextThread(encoder)


def test_masked_modelling_is_refused(tokenizer):
    encoder = tiny_model(tokenizer)
    masked = MaskedModelling(MaskedConfig(cmlm_weight=1.0), encoder, image_size=IMAGE_SIZE)
    with pytest.raises(ConfigError, match="masked modelling reads the states of both towers"):
        PretrainingModel(encoder, masked=masked, text_thread=TextThread(encoder))
