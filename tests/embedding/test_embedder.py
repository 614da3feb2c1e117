"""Vectors come in input order, of unit length, and do not depend on how they were asked for."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests.builders import THINGS, encoded, make_image, tiny_bundle
from vlm.bundle import load_bundle
from vlm.embedding.embedder import Embedder
from vlm.errors import DataError, VlmError

TEXTS = [text for pair in THINGS for text in pair]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def embedder(bundle):
    return Embedder.load(bundle, device="cpu")


@pytest.fixture(scope="module")
def images():
    return [encoded(make_image(number, size=(40 + number, 50 - number))) for number in range(9)]


class FourMembers:
    """What a session of another runtime offers."""

    def __init__(self, model):
        self.embed_dim, self.device = model.embed_dim, torch.device("cpu")
        self.encode_image, self.encode_text = model.encode_image, model.encode_text


def test_a_runtime_of_four_members_takes_the_place_of_the_model(bundle, embedder, images):
    read = load_bundle(bundle)
    runtime = FourMembers(read.model)
    other = Embedder(read, model=runtime, device="cpu")
    assert other.model is runtime
    np.testing.assert_array_equal(other.encode_image(images), embedder.encode_image(images))
    np.testing.assert_array_equal(other.encode_text(TEXTS), embedder.encode_text(TEXTS))


def test_a_model_that_is_given_stays_where_it_is(bundle):
    read = load_bundle(bundle)
    live = load_bundle(bundle).model
    before = [weight.data_ptr() for weight in live.parameters()]
    embedder = Embedder(read, model=live)
    assert embedder.model is live
    assert [weight.data_ptr() for weight in live.parameters()] == before
    assert embedder.truncated(32).model is live


def test_texts_keep_their_order(embedder):
    together = embedder.encode_text(TEXTS, batch_size=5)
    alone = np.concatenate([embedder.encode_text([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(np.unique(together.round(4), axis=0)) == len(TEXTS)


def test_images_keep_their_order(embedder, images):
    together = embedder.encode_image(images, batch_size=4)
    alone = np.concatenate([embedder.encode_image([image]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(np.unique(together.round(4), axis=0)) == len(images)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 24, 1000])
def test_the_batch_size_does_not_change_the_vectors(embedder, images, batch_size):
    np.testing.assert_allclose(
        embedder.encode_text(TEXTS, batch_size=batch_size), embedder.encode_text(TEXTS), atol=1e-5
    )
    np.testing.assert_allclose(
        embedder.encode_image(images, batch_size=batch_size),
        embedder.encode_image(images),
        atol=1e-5,
    )


def test_vectors_are_float32_of_unit_length(embedder, images):
    for vectors, count in (
        (embedder.encode_text([*TEXTS, ""]), len(TEXTS) + 1),
        (embedder.encode_image(images), len(images)),
    ):
        assert vectors.dtype == np.float32
        assert vectors.shape == (count, embedder.embed_dim) == (count, 32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_an_empty_list_gives_no_vectors(embedder):
    for vectors in (embedder.encode_text([]), embedder.encode_image([])):
        assert vectors.shape == (0, 32)
        assert vectors.dtype == np.float32


def test_any_way_to_give_an_image_gives_the_same_vector(embedder, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(make_image(3)))
    with Image.open(path) as opened:
        vectors = embedder.encode_image(
            [
                str(path),
                path,
                path.read_bytes(),
                opened,
                make_image(3),
                make_image(3).convert("RGBA"),
            ]
        )
    for vector in vectors[1:]:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-6)
    other = embedder.encode_image([make_image(4)])[0]
    assert not np.allclose(other, vectors[0], atol=1e-3)


def test_features_are_those_of_the_model(embedder, images):
    with torch.inference_mode():
        texts = embedder.model.encode_text(embedder.tokenizer.encode(TEXTS)).numpy()
        tensor = embedder.bundle.transform(make_image(3))[None]
        image = embedder.model.encode_image(tensor).numpy()
    np.testing.assert_allclose(embedder.encode_text(TEXTS), texts, atol=1e-6)
    np.testing.assert_allclose(embedder.encode_image([make_image(3)]), image, atol=1e-6)


def test_similarity_is_the_cosine_of_every_pair(embedder, images):
    texts, pictures = embedder.encode_text(TEXTS), embedder.encode_image(images)
    similarity = embedder.similarity(texts, pictures)
    assert similarity.shape == (len(TEXTS), len(images))
    for row, text in enumerate(texts.astype(np.float64)):
        for column, image in enumerate(pictures.astype(np.float64)):
            cosine = text @ image / np.linalg.norm(text) / np.linalg.norm(image)
            assert similarity[row, column] == pytest.approx(cosine, abs=1e-5)


def test_vectors_of_different_widths_are_not_compared(embedder):
    texts = embedder.encode_text(TEXTS)
    with pytest.raises(VlmError, match="32 numbers with vectors of 16; expected one width"):
        embedder.similarity(texts, texts[:, :16])


def test_one_vector_is_compared_with_many_and_with_one(embedder, images):
    texts, pictures = embedder.encode_text(TEXTS), embedder.encode_image(images)
    whole = embedder.similarity(texts, pictures)
    np.testing.assert_allclose(embedder.similarity(texts[3], pictures), whole[3], atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(texts, pictures[2]), whole[:, 2], atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(texts[3], pictures[2]), whole[3, 2], atol=1e-6)


def test_long_texts_are_cut_and_not_refused(embedder):
    assert embedder.encode_text(["a very long text " * 50]).shape == (1, 32)


@pytest.mark.parametrize(
    "texts", [["cat", 3], [b"cat"], [None]], ids=["a number", "bytes", "None"],
)  # fmt: skip
def test_what_is_not_a_string_is_refused(embedder, texts):
    # Under jaxtyping's checks the annotation answers first.
    with pytest.raises((VlmError, TypeError), match=r"list of strings|checking the parameters of"):
        embedder.encode_text(texts)


def test_a_lone_text_has_one_vector(embedder):
    for text in ("red apple", ""):
        np.testing.assert_array_equal(embedder.encode_text(text), embedder.encode_text([text])[0])


def test_a_lone_image_has_one_vector(embedder, tmp_path):
    path = tmp_path / "0.png"
    path.write_bytes(encoded(make_image(0)))
    (expected,) = embedder.encode_image([path])
    with path.open("rb") as opened:
        for image in (
            path, str(path), path.read_bytes(), make_image(0), np.asarray(make_image(0)),
            io.BytesIO(path.read_bytes()), opened,
        ):  # fmt: skip
            np.testing.assert_allclose(embedder.encode_image(image), expected, atol=1e-6)


def test_images_may_come_from_a_generator_or_in_one_array(embedder):
    drawn = [make_image(number) for number in range(3)]
    expected = embedder.encode_image(drawn)
    np.testing.assert_array_equal(embedder.encode_image(image for image in drawn), expected)
    together = np.stack([np.asarray(image) for image in drawn])
    np.testing.assert_array_equal(embedder.encode_image(together), expected)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("https://example.com/cat.png", "is a URL; expected a path: download it"),
        (np.zeros((3, 8, 8), np.float32), "array of float32 and shape .* expected uint8 of height"),
        (np.zeros((8,), np.uint8), "expected uint8 of height x width x 3"),
        (np.zeros((3, 8, 9), np.uint8), "shape .3, 8, 9. is not an image; expected uint8 of"),
        (np.zeros((0, 8, 3), np.uint8), "shape .0, 8, 3. is not an image; expected uint8 of"),
        (torch.zeros(3, 8, 8), "an object of type Tensor is not an image; expected a path"),
        (5, "expected images, found an object of type int"),
        (None, "expected images, found an object of type NoneType"),
        (io.StringIO("text"), "an object of type StringIO is not an image"),
    ],
    ids=[
        "URL", "floats", "one axis", "channels first", "empty", "tensor", "number", "None",
        "text file",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_is_not_an_image_is_refused_by_a_clear_sentence(embedder, image, said):
    with pytest.raises(VlmError, match=said):
        embedder.encode_image(image)


@pytest.mark.usefixtures("unchecked")
def test_texts_may_come_from_a_generator_and_vectors_in_a_list(embedder):
    vectors = embedder.encode_text(text for text in TEXTS)
    np.testing.assert_array_equal(vectors, embedder.encode_text(TEXTS))
    cosines = embedder.similarity(list(vectors), vectors)
    np.testing.assert_allclose(cosines, embedder.similarity(vectors, vectors), atol=1e-6)


def test_a_model_with_nan_weights_gives_an_error_and_no_vectors(bundle):
    embedder = Embedder.load(bundle, device="cpu")
    with torch.no_grad():
        next(iter(embedder.model.text.parameters())).fill_(torch.nan)
    with pytest.raises(VlmError, match="gives vectors that are not finite"):
        embedder.encode_text(TEXTS)


def test_an_image_that_cannot_be_read_is_named(embedder, tmp_path):
    with pytest.raises(DataError, match=r"gone\.png"):
        embedder.encode_image([encoded(make_image(0)), str(tmp_path / "gone.png")])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_without_room_is_refused(embedder, batch_size):
    with pytest.raises(VlmError, match=f"batch_size is {batch_size}; expected at least 1"):
        embedder.encode_text(TEXTS, batch_size=batch_size)


@pytest.mark.parametrize("device", ["banana", "no-such-device", "cuda:999"])
def test_a_device_that_is_not_there_is_named(bundle, device):
    here = " or ".join(["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))])
    with pytest.raises(VlmError) as caught:
        Embedder.load(bundle, device=device)
    assert str(caught.value) == f"cannot use the device {device}; expected {here}"


def test_a_model_without_room_on_its_device_is_told(bundle, monkeypatch):
    read = load_bundle(bundle)

    def fill(_device):
        raise torch.OutOfMemoryError("many words")

    monkeypatch.setattr(read.model, "to", fill)
    with pytest.raises(VlmError, match=r"^the model does not fit into the free memory of cpu$"):
        Embedder(read, device="cpu")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_the_mode_of_the_model_is_as_before(bundle, training):
    embedder = Embedder.load(bundle, device="cpu")
    expected = embedder.encode_image([make_image(0), make_image(1)])
    embedder.model.train(training)
    # In training mode batch normalisation would mix the two images.
    np.testing.assert_allclose(
        embedder.encode_image([make_image(0), make_image(1)]), expected, atol=1e-6
    )
    assert embedder.model.training == training
    with pytest.raises(DataError):
        embedder.encode_image([b"no image"])
    assert embedder.model.training == training


def test_encoding_changes_no_statistics_of_the_model(bundle):
    embedder = Embedder.load(bundle, device="cpu")
    embedder.model.train()
    before = {name: tensor.clone() for name, tensor in embedder.model.state_dict().items()}
    embedder.encode_image([make_image(0), make_image(1)])
    assert all(tensor.equal(before[name]) for name, tensor in embedder.model.state_dict().items())


def test_progress_is_shown_on_stderr_when_asked_for(embedder, capsys):
    embedder.encode_text(TEXTS)
    assert capsys.readouterr() == ("", "")
    embedder.encode_text(TEXTS, batch_size=6, show_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4" in err


def test_the_packages_own_load_reads_a_bundle(bundle):
    embedder = vlm.load(str(bundle), device="cpu")
    assert isinstance(embedder, vlm.Embedder)
    assert embedder.languages == ("zh", "en")
    assert len(embedder.fingerprint) == 64
    assert embedder.device == torch.device("cpu")
