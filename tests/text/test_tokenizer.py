"""Batches are padded to their longest text; a tokenizer folder is read or refused by name."""

import json

import pytest
import torch

from tests.builders import tiny_tokenizer
from vlm.errors import TokenizerError
from vlm.text.tokenizer import Tokenizer, load_tokenizer, pad


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save(tmp_path)
    return tmp_path


def test_padding_fills_to_the_longest_text_and_no_further():
    batch = pad([[5, 6], [7], [8, 9, 10]], 0)
    assert batch.ids.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]
    assert batch.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert (batch.ids.dtype, batch.mask.dtype) == (torch.int64, torch.bool)


def test_a_token_that_equals_the_padding_id_is_still_a_token():
    batch = pad([[4, 4], [4]], 4)
    assert batch.ids.tolist() == [[4, 4], [4, 4]]
    assert batch.mask.tolist() == [[True, True], [True, False]]


def test_no_texts_give_an_empty_batch():
    batch = pad([], 0)
    assert batch.ids.shape == batch.mask.shape == (0, 0)
    assert (batch.ids.dtype, batch.mask.dtype) == (torch.int64, torch.bool)


def test_a_batch_moves_with_both_tensors():
    moved = pad([[1, 2], [3]], 0).to(torch.device("meta"))
    assert moved.ids.device.type == moved.mask.device.type == "meta"
    assert moved.ids.shape == (2, 2)


def test_a_saved_tokenizer_is_read_as_one(folder):
    assert isinstance(load_tokenizer(folder), Tokenizer)


def test_a_folder_without_description_names_the_file_it_lacks(tmp_path):
    with pytest.raises(TokenizerError, match=rf"{tmp_path} .* vlm_tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b'"sentencepiece"', b"{}", b"\xff\xfe"],
    ids=["empty", "cut off", "a list", "null", "a string", "no kind", "not UTF-8"],
)
def test_a_bad_description_is_named(folder, text):
    (folder / "vlm_tokenizer.json").write_bytes(text)
    with pytest.raises(TokenizerError, match=r"vlm_tokenizer\.json does not describe a tokenizer"):
        load_tokenizer(folder)


def test_an_unknown_kind_says_which_kinds_are_known(folder):
    description = {"kind": "wordpiece", "context_length": 16}
    (folder / "vlm_tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match=r"'wordpiece' tokenizer; .* 'sentencepiece'"):
        load_tokenizer(folder)


@pytest.mark.parametrize("length", [None, "16", 16.0], ids=["missing", "a string", "a fraction"])
def test_a_context_length_that_is_no_integer_is_refused(folder, length):
    description = {"kind": "sentencepiece", "context_length": length}
    (folder / "vlm_tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match=r"context_length is .*; expected an integer"):
        load_tokenizer(folder)


def test_a_missing_model_is_named(folder):
    (folder / "sentencepiece.model").unlink()
    with pytest.raises(TokenizerError, match=r"sentencepiece\.model is missing"):
        load_tokenizer(folder)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_model_cut_short_is_refused(folder, share):
    model = (folder / "sentencepiece.model").read_bytes()
    (folder / "sentencepiece.model").write_bytes(model[: int(len(model) * share)])
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        load_tokenizer(folder)
