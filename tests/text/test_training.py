"""A tokenizer is trained to the same bytes each time, and loses no character of any text."""

import pytest

from tests.builders import THINGS
from vlm.errors import TokenizerError
from vlm.text.training import BEGIN_ID, END_ID, PAD_ID, train_sentencepiece

TEXTS = [text for pair in THINGS for text in pair] * 3


def train(texts=TEXTS, *, vocab_size=320, **options):
    return train_sentencepiece(texts, vocab_size=vocab_size, context_length=64, **options)


def ids_of(tokenizer, text):
    return tokenizer.encode([text]).ids[0].tolist()


@pytest.fixture(scope="module")
def tokenizer():
    return train()


def test_training_twice_gives_the_same_bytes(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "first")
    train().save(tmp_path / "second")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert set(first) == {"sentencepiece.model", "vlm_tokenizer.json"}
    assert first == second


def test_other_texts_give_another_tokenizer(tokenizer):
    assert train([*TEXTS, "something else"]).fingerprint != tokenizer.fingerprint


def test_an_iterator_of_texts_is_as_good_as_a_list(tokenizer):
    assert train(text for text in TEXTS).fingerprint == tokenizer.fingerprint


def test_line_breaks_inside_a_text_do_not_split_it():
    texts = [f"{en}\n{zh}" for en, zh in THINGS] * 3
    assert train(texts).fingerprint == train([f"{en} {zh}" for en, zh in THINGS] * 3).fingerprint


def test_special_ids_have_their_fixed_places(tokenizer):
    assert (PAD_ID, BEGIN_ID, END_ID) == (0, 2, 3)
    assert tokenizer.pad_id == PAD_ID
    assert tokenizer.end_of_text_id == END_ID
    assert ids_of(tokenizer, "cat")[0] == BEGIN_ID


@pytest.mark.parametrize("pair", THINGS, ids=[en for en, _ in THINGS])
def test_both_languages_get_pieces_longer_than_bytes(tokenizer, pair):
    for text in pair:
        ids = ids_of(tokenizer, text)[1:-1]
        assert len(ids) <= len(text) + 1  # a Chinese character is three bytes
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["🦄", "𠮷野家", "ñandú", "שלום", "龘 and 🏳️‍🌈"],
    ids=["emoji", "rare character", "accents", "Hebrew", "a joined sequence"],
)  # fmt: skip
def test_bytes_carry_characters_that_were_never_seen(tokenizer, text):
    ids = ids_of(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert 1 not in ids  # the unknown id


@pytest.mark.parametrize(
    "text", ["Green Tea", "GREEN TEA", "ｇｒｅｅｎ　ｔｅａ", " green  tea "],
    ids=["capitals", "all capitals", "full width", "spaces"],
)  # fmt: skip
def test_case_width_and_space_share_ids(tokenizer, text):
    assert ids_of(tokenizer, text) == ids_of(tokenizer, "green tea")


def test_digits_are_pieces_of_their_own():
    tokenizer = train([*TEXTS, *["the year 2024"] * 20], vocab_size=320)
    assert len(ids_of(tokenizer, "2024")) - len(ids_of(tokenizer, "")) >= 4
    assert tokenizer.decode(ids_of(tokenizer, "2024")) == "2024"


def test_a_word_is_the_same_piece_at_the_start_of_a_word_and_inside_one():
    tokenizer = train([*TEXTS, *["board", "snowboard", "snow", "board game"] * 20], vocab_size=320)
    board = ids_of(tokenizer, "board")[-2]
    assert ids_of(tokenizer, "snowboard")[-2] == board
    assert board in ids_of(tokenizer, "a board game")
    assert tokenizer.decode(ids_of(tokenizer, "a board game")) == "a board game"


@pytest.mark.parametrize("texts", [[], [""], [" \n", "\u3000"]], ids=["none", "empty", "blank"])
def test_no_text_to_train_on_is_refused(texts):
    with pytest.raises(TokenizerError, match="no text to train a tokenizer on"):
        train(texts)


@pytest.mark.parametrize("vocab_size", [100_000, 270, 0], ids=["too large", "too small", "zero"])
def test_a_vocabulary_that_cannot_be_filled_is_refused_with_its_size(vocab_size):
    with pytest.raises(TokenizerError, match=rf"a vocabulary of {vocab_size} on 72 texts"):
        train(vocab_size=vocab_size)


def test_training_prints_nothing(capfd):
    train()
    assert capfd.readouterr() == ("", "")
