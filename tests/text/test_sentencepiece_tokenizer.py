"""Ids are SentencePiece's own between a begin and an end marker, within the context."""

import io
import logging

import pytest
import sentencepiece

from tests.builders import THINGS, tiny_tokenizer
from vlm.errors import TokenizerError
from vlm.text.sentencepiece_tokenizer import SentencePieceTokenizer
from vlm.text.tokenizer import load_tokenizer
from vlm.text.training import BEGIN_ID, END_ID, PAD_ID

TEXTS = [text for pair in THINGS for text in pair]
LONG = "a red apple, a grey cat, a small dog, a fast train and the blue sea"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(context_length=64)


@pytest.fixture(scope="module")
def processor(tmp_path_factory, tokenizer):
    """Return the same model as the library itself reads it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))


@pytest.fixture
def short():
    """Return a tokenizer with room for three tokens between the markers."""
    return tiny_tokenizer(context_length=5)


def model_without(*missing: str) -> bytes:
    """Train a model that lacks some of the special ids."""
    ids = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3} | dict.fromkeys(missing, -1)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=100, minloglevel=2,
        hard_vocab_limit=False, **ids,
    )  # fmt: skip
    return model.getvalue()


def test_ids_are_sentencepieces_own_between_the_markers(tokenizer, processor):
    batch = tokenizer.encode(TEXTS)
    for text, ids, mask in zip(TEXTS, batch.ids, batch.mask, strict=True):
        assert ids[mask].tolist() == [BEGIN_ID, *processor.encode(text), END_ID]
        assert ids[~mask].eq(PAD_ID).all()


def test_a_batch_is_as_long_as_its_longest_text(tokenizer, processor):
    texts = ["sun", "a red apple on the round moon"]
    longest = max(len(processor.encode(text)) for text in texts) + 2
    assert tokenizer.encode(texts).ids.shape == (2, longest)
    assert longest < tokenizer.context_length


def test_the_ids_of_a_text_do_not_depend_on_its_batch(tokenizer):
    alone = tokenizer.encode(["green tea"])
    among = tokenizer.encode([LONG, "green tea"])
    assert among.ids[1][among.mask[1]].tolist() == alone.ids[0].tolist()


def test_an_empty_text_is_its_two_markers(tokenizer):
    batch = tokenizer.encode(["", "sun"])
    assert batch.ids[0][batch.mask[0]].tolist() == [BEGIN_ID, END_ID]


def test_no_texts_give_an_empty_batch(tokenizer):
    assert tokenizer.encode([]).ids.shape == (0, 0)


def test_ids_lie_in_the_vocabulary(tokenizer, processor):
    ids = tokenizer.encode([*TEXTS, "🦄 𠮷 unseen"]).ids
    assert tokenizer.vocab_size == processor.get_piece_size() == 320
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize("text", ["<s>", "</s>", "<pad>", "<unk>", "x </s> y"])
def test_a_text_that_looks_like_a_marker_becomes_none(tokenizer, text):
    ids = tokenizer.encode([text]).ids[0].tolist()
    assert not {PAD_ID, BEGIN_ID, END_ID} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text


def test_a_long_text_loses_its_tail_and_keeps_its_end(short, processor):
    batch = short.encode([LONG])
    assert batch.ids.tolist() == [[BEGIN_ID, *processor.encode(LONG)[:3], END_ID]]
    assert batch.mask.all()


def test_a_text_that_just_fits_is_whole(processor):
    text = "a red apple"
    room = len(processor.encode(text)) + 2
    fits, cut = tiny_tokenizer(context_length=room), tiny_tokenizer(context_length=room - 1)
    assert fits.decode(fits.encode([text]).ids[0].tolist()) == text
    assert fits.truncated_share == 0
    assert cut.encode([text]).ids.shape == (1, room - 1)
    assert cut.truncated_share == 1


def test_truncation_is_said_once_with_counts(short, caplog):
    with caplog.at_level(logging.WARNING):
        short.encode(["", ""])
        short.encode([LONG, "", LONG])
        short.encode([LONG])
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 3 texts are longer than 5 tokens and lost their tail"
    ]


def test_the_truncated_share_counts_all_texts_so_far(short):
    assert short.truncated_share == 0
    short.encode([LONG, ""])
    short.encode(["", ""])
    assert short.truncated_share == 0.25


def test_decoding_gives_the_text_back_without_markers_and_padding():
    tokenizer = tiny_tokenizer(context_length=100)
    batch = tokenizer.encode([*TEXTS, LONG])
    decoded = [tokenizer.decode(ids) for ids in batch.ids.tolist()]
    assert decoded == [*TEXTS, LONG]


def test_a_saved_tokenizer_gives_the_same_ids_and_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.encode(TEXTS).ids.equal(tokenizer.encode(TEXTS).ids)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.context_length == tokenizer.context_length
    assert (loaded.pad_id, loaded.end_of_text_id) == (PAD_ID, END_ID)


def test_the_fingerprint_tells_context_lengths_and_models_apart():
    same, again = tiny_tokenizer(), tiny_tokenizer()
    assert same.fingerprint == again.fingerprint
    assert same.fingerprint != tiny_tokenizer(context_length=17).fingerprint
    assert same.fingerprint != tiny_tokenizer(vocab_size=319).fingerprint


def test_the_fingerprint_does_not_depend_on_use(short):
    before = short.fingerprint
    short.encode([LONG])
    assert short.fingerprint == before


@pytest.mark.parametrize("length", [2, 1, 0, -1])
def test_a_context_without_room_for_a_token_is_refused(length):
    with pytest.raises(TokenizerError, match=f"context_length is {length}; expected at least 3"):
        tiny_tokenizer(context_length=length)


@pytest.mark.parametrize("model", [b"x", b"\0" * 100, b"{}"], ids=["a letter", "zeros", "JSON"])
def test_bytes_that_are_no_model_are_refused(model):
    with pytest.raises(TokenizerError, match=rf"not a SentencePiece model \({len(model)} bytes\)"):
        SentencePieceTokenizer(model, context_length=8)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["pad_id"], "no padding id"),
        (["bos_id"], "no begin id"),
        (["eos_id"], "no end id"),
        (["pad_id", "eos_id"], "no padding and no end id"),
    ],
    ids=["padding", "begin", "end", "padding and end"],
)
def test_a_model_without_a_special_id_is_refused_by_its_name(missing, said):
    with pytest.raises(TokenizerError, match=said):
        SentencePieceTokenizer(model_without(*missing), context_length=8)
