"""Texts become a padded batch between a begin and an end; a folder is read or refused by name."""

import json
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer, models, pre_tokenizers

from tests.builders import tiny_tokenizer
from vlm.errors import TokenizerError
from vlm.text.config import TokenizerConfig
from vlm.text.fast_vocabulary import FastVocabulary
from vlm.text.tokenizer import Tokenizer, load_tokenizer, pad
from vlm.text.vocabulary import Vocabulary

PIECES = ("<pad>", "<begin>", "<end>", "<unknown>", "a", "red", "apple", "and", "grey", "cat")
PAD, BEGIN, END, UNKNOWN, A, RED, APPLE, AND, GREY, CAT = range(len(PIECES))
LONG = "a red apple and a grey cat"
LONG_IDS = [A, RED, APPLE, AND, A, GREY, CAT]
CONFIG = TokenizerConfig(
    context_length=6, begin_of_text="<begin>", end_of_text="<end>", padding="<pad>"
)


def vocabulary_of_words(pieces=PIECES) -> FastVocabulary:
    """Make a vocabulary whose pieces are whole words, so that ids can be said by hand."""
    rust = RustTokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unknown>")
    )
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastVocabulary(rust.to_str().encode())


def words(**changes: object) -> Tokenizer:
    return Tokenizer(vocabulary_of_words(), replace(CONFIG, **changes))


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save(tmp_path)
    return tmp_path


def describe(folder, **changes):
    """Write a description by hand; None leaves a part out."""
    description = {"kind": "sentencepiece", "context_length": 16} | changes
    (folder / "vlm_tokenizer.json").write_text(
        json.dumps({name: value for name, value in description.items() if value is not None})
    )


def test_padding_fills_to_the_longest_text_and_no_further():
    batch = pad([[5, 6], [7], [8, 9, 10]], 0)
    assert batch.ids.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]
    assert batch.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert (batch.ids.dtype, batch.mask.dtype) == (torch.int64, torch.bool)


def test_a_token_that_equals_the_padding_id_is_still_a_token():
    batch = pad([[4, 4], [4]], 4)
    assert batch.ids.tolist() == [[4, 4], [4, 4]]
    assert batch.mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(("length", "width"), [(None, 0), (77, 77)], ids=["shortest", "asked for"])
def test_no_texts_give_an_empty_batch(length, width):
    batch = pad([], 0, length)
    assert batch.ids.shape == batch.mask.shape == (0, width)
    assert (batch.ids.dtype, batch.mask.dtype) == (torch.int64, torch.bool)
    assert words().encode([], pad_to=length).ids.shape == (0, width)


def test_a_batch_moves_with_both_tensors():
    moved = pad([[1, 2], [3]], 0).to(torch.device("meta"))
    assert moved.ids.device.type == moved.mask.device.type == "meta"
    assert moved.ids.shape == (2, 2)


def test_a_text_stands_between_begin_and_end():
    batch = words().encode(["a red apple", "cat"])
    assert batch.ids.tolist() == [[BEGIN, A, RED, APPLE, END], [BEGIN, CAT, END, PAD, PAD]]
    assert batch.mask.tolist() == [[True] * 5, [True, True, True, False, False]]


def test_without_a_begin_there_is_room_for_one_more():
    batch = words(begin_of_text=None).encode([LONG, "cat"])
    assert batch.ids.tolist() == [[*LONG_IDS[:5], END], [CAT, END, *[PAD] * 4]]
    assert words(begin_of_text=None).special_ids.begin_of_text is None


def test_an_empty_text_is_its_two_markers():
    assert words().encode(["", "  "]).ids.tolist() == [[BEGIN, END], [BEGIN, END]]


def test_special_ids_are_those_of_the_named_pieces():
    special = words().special_ids
    assert (special.begin_of_text, special.end_of_text) == (BEGIN, END)
    assert (special.padding, special.unknown) == (PAD, UNKNOWN)
    assert words().encode(["dog"]).ids.tolist() == [[BEGIN, UNKNOWN, END]]


def test_the_ids_of_a_text_do_not_depend_on_its_batch():
    alone, among = words().encode(["grey cat"]), words().encode([LONG, "grey cat", ""])
    assert among.ids[1][among.mask[1]].tolist() == alone.ids[0].tolist()


@pytest.mark.parametrize("length", [5, 6, 9], ids=["the longest", "the context", "longer"])
def test_a_batch_is_as_long_as_asked_for(length):
    batch = words().encode(["a red apple", "cat"], pad_to=length)
    assert batch.ids.shape == batch.mask.shape == (2, length)
    assert batch.mask.sum(dim=1).tolist() == [5, 3]
    assert batch.ids[~batch.mask].eq(PAD).all()


@pytest.mark.parametrize("length", [4, 0, -1])
def test_a_batch_shorter_than_its_longest_text_is_refused(length):
    with pytest.raises(TokenizerError, match=rf"pad_to is {length}; expected at least 5"):
        words().encode(["a red apple", "cat"], pad_to=length)


@pytest.mark.parametrize(("truncation", "kept"), [("right", LONG_IDS[:4]), ("left", LONG_IDS[-4:])])
def test_a_long_text_loses_one_side_and_keeps_its_end(truncation, kept):
    batch = words(truncation=truncation).encode([LONG, "cat"])
    assert batch.ids.tolist() == [[BEGIN, *kept, END], [BEGIN, CAT, END, PAD, PAD, PAD]]


@pytest.mark.parametrize("truncation", ["right", "left"])
@pytest.mark.parametrize("begin", ["<begin>", None], ids=["with a begin", "without"])
def test_a_text_that_just_fits_is_whole(truncation, begin):
    length = len(LONG_IDS) + (1 if begin is None else 2)
    changes = {"truncation": truncation, "begin_of_text": begin}
    fits = words(context_length=length, **changes)
    cut = words(context_length=length - 1, **changes)
    assert fits.encode([LONG]).ids[0, -1 - len(LONG_IDS) : -1].tolist() == LONG_IDS
    assert cut.encode([LONG]).ids.shape == (1, length - 1)
    assert (fits.truncated_share, cut.truncated_share) == (0, 1)


def test_splitting_is_neither_cut_nor_counted_nor_marked():
    tokenizer = words()
    assert tokenizer.split([LONG, ""]) == [LONG_IDS, []]
    assert tokenizer.split(text for text in ["cat"]) == [[CAT]]
    assert tokenizer.truncated_share == 0


@pytest.mark.parametrize(("truncation", "lost"), [("right", "tail"), ("left", "head")])
def test_truncation_is_said_once_with_counts(truncation, lost, caplog):
    tokenizer = words(truncation=truncation)
    with caplog.at_level(logging.WARNING):
        tokenizer.encode(["", ""])
        tokenizer.encode([LONG, "", LONG])
        tokenizer.encode([LONG])
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 3 texts (66.7 %) are longer than 6 tokens and lost their {lost}"
    ]


def test_the_truncated_share_counts_all_texts_so_far():
    tokenizer = words()
    assert tokenizer.truncated_share == 0
    tokenizer.encode([LONG, ""])
    tokenizer.encode(["", ""])
    tokenizer.encode([])
    assert tokenizer.truncated_share == 0.25


@pytest.mark.parametrize("text", [LONG, "cat", ""], ids=["cut", "padded", "empty"])
def test_decoding_leaves_out_markers_and_padding(text):
    tokenizer = words()
    ids = tokenizer.encode([text, LONG]).ids[0].tolist()
    assert tokenizer.decode(ids) == " ".join(text.split()[:4])
    assert tokenizer.decode(tokenizer.split([text])[0]) == text


def test_a_piece_that_also_pads_is_decoded_where_it_is_text():
    tokenizer = words(padding="cat")
    batch = tokenizer.encode(["cat and cat", "a"])
    assert [tokenizer.decode(ids) for ids in batch.ids.tolist()] == ["cat and cat", "a"]


def test_an_end_that_also_pads_is_told_apart_by_the_mask():
    tokenizer = words(padding="<end>")
    batch = tokenizer.encode(["a red apple", "cat"])
    assert batch.ids.tolist() == [[BEGIN, A, RED, APPLE, END], [BEGIN, CAT, END, END, END]]
    assert batch.mask.tolist() == [[True] * 5, [True, True, True, False, False]]
    assert [tokenizer.decode(ids) for ids in batch.ids.tolist()] == ["a red apple", "cat"]


def test_cleaning_comes_before_splitting():
    assert words(cleaning="lower").split(["A RED Cat"]) == [[A, RED, CAT]]
    assert words(cleaning="clip").split(["A&nbsp;Ｒｅｄ cat"]) == [[A, RED, CAT]]
    assert words().split(["A red"]) == [[UNKNOWN, RED]]


@pytest.mark.parametrize("cleaning", ["none", "lower", "glm", "words"])
@pytest.mark.parametrize("text", ["\ud800", "a \udfff cat", "\ud83d\ude00"])
def test_half_a_character_is_refused(cleaning, text):
    tokenizer = words(cleaning=cleaning)
    for use in (tokenizer.split, tokenizer.encode):
        with pytest.raises(TokenizerError, match="not strings of valid Unicode"):
            use(["a cat", text])
    with pytest.raises(TokenizerError, match="not strings of valid Unicode"):
        tokenizer.split(["\ud83d", "\ude00"])
    assert tokenizer.truncated_share == 0


@pytest.mark.parametrize("cleaning", ["none", "lower", "clip", "glm", "words"])
@pytest.mark.parametrize("text", [None, 7, b"cat", ["cat"]], ids=repr)
def test_what_is_no_string_is_refused(unchecked, cleaning, text):
    tokenizer = words(cleaning=cleaning)
    for use in (tokenizer.split, tokenizer.encode):
        with pytest.raises(TokenizerError, match="not strings of valid Unicode"):
            use(["a cat", text])


def test_no_list_of_texts_at_all_is_refused(unchecked):
    with pytest.raises(TokenizerError, match="not strings of valid Unicode"):
        words().encode(None)


def kinds():
    return [pytest.param(words, id="fast"), pytest.param(tiny_tokenizer, id="sentencepiece")]


@pytest.mark.parametrize("make", kinds())
def test_a_saved_tokenizer_gives_the_same_ids_and_fingerprint(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    texts = [LONG, "红苹果 cat", ""]
    assert loaded.encode(texts).ids.equal(tokenizer.encode(texts).ids)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.config == tokenizer.config
    assert loaded.special_ids == tokenizer.special_ids
    assert loaded.vocab_size == tokenizer.vocab_size == len(tokenizer.vocabulary.pieces())
    assert loaded.context_length == tokenizer.context_length
    assert isinstance(loaded.vocabulary, Vocabulary)


@pytest.mark.parametrize(
    ("make", "files"),
    [
        pytest.param(words, {"tokenizer.json", "vlm_tokenizer.json"}, id="fast"),
        pytest.param(
            tiny_tokenizer, {"sentencepiece.model", "vlm_tokenizer.json"}, id="sentencepiece"
        ),
    ],
)
def test_two_tokenizers_that_are_alike_are_saved_as_the_same_bytes(make, files, tmp_path):
    for name in ("first", "second"):
        make().save(tmp_path / name)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second
    assert files <= first.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"context_length": 7},
        {"begin_of_text": None},
        {"begin_of_text": "<end>"},
        {"end_of_text": "<pad>"},
        {"padding": "<end>"},
        {"truncation": "left"},
        {"cleaning": "lower"},
    ],
    ids=str,
)
def test_all_that_decides_on_ids_changes_the_fingerprint(changes):
    assert words(**changes).fingerprint != words().fingerprint
    other = Tokenizer(vocabulary_of_words((*PIECES, "dog")), CONFIG)
    assert other.fingerprint != words().fingerprint


def test_the_fingerprint_does_not_depend_on_use():
    tokenizer = words()
    before = tokenizer.fingerprint
    tokenizer.encode([LONG])
    assert tokenizer.fingerprint == before == words().fingerprint


def test_a_description_by_hand_may_leave_out_what_the_model_says(folder):
    saved = load_tokenizer(folder)
    describe(folder)
    assert load_tokenizer(folder).config == replace(saved.config, cleaning="none")
    describe(folder, begin_of_text="</s>", truncation="left", cleaning="lower")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_ids.begin_of_text == saved.special_ids.end_of_text
    assert (tokenizer.config.truncation, tokenizer.config.cleaning) == ("left", "lower")


def test_a_description_by_hand_may_say_that_there_is_no_begin(folder):
    description = {"kind": "sentencepiece", "context_length": 16, "begin_of_text": None}
    (folder / "vlm_tokenizer.json").write_text(json.dumps(description))
    assert load_tokenizer(folder).special_ids.begin_of_text is None


def test_a_folder_without_description_names_the_file_it_lacks(tmp_path):
    with pytest.raises(TokenizerError, match=rf"{tmp_path} .* vlm_tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"7", b'"sentencepiece"', b"{}", b"\xff\xfe"],
    ids=["empty", "cut off", "a list", "null", "a number", "a string", "no kind", "not UTF-8"],
)
def test_a_bad_description_is_named(folder, text):
    (folder / "vlm_tokenizer.json").write_bytes(text)
    with pytest.raises(TokenizerError, match=r"vlm_tokenizer\.json does not describe a tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["wordpiece", "", 7, ["sentencepiece"], {}], ids=repr)
def test_an_unknown_kind_says_which_kinds_are_known(folder, kind):
    describe(folder, kind=kind)
    with pytest.raises(
        TokenizerError, match=r"tokenizer; .* reads 'sentencepiece' and 'tokenizer\.json'"
    ):
        load_tokenizer(folder)


def test_an_unknown_part_says_which_parts_are_known(folder):
    describe(folder, pad_id=0, lower=True)
    with pytest.raises(
        TokenizerError,
        match=r"vlm_tokenizer\.json says lower, pad_id; expected only begin_of_text, cleaning",
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("length", ["16", 16.0, True, [16], 2, 0, -1], ids=repr)
def test_a_context_length_is_an_integer_with_room_for_a_token(unchecked, folder, length):
    describe(folder, context_length=length)
    with pytest.raises(
        TokenizerError,
        match=r"vlm_tokenizer\.json: context_length is .*; expected an integer, at least 3",
    ):
        load_tokenizer(folder)


def test_a_missing_context_length_is_named(unchecked, folder):
    describe(folder, context_length=None)
    with pytest.raises(TokenizerError, match=r"vlm_tokenizer\.json lacks .*'context_length'"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("truncation", "right, left"),
        ("cleaning", "none, lower, clip, glm, words, whitespace, canonicalize"),
    ],
)
@pytest.mark.parametrize("value", ["both", "", 7, [], {}], ids=repr)
def test_a_setting_has_one_of_a_few_values(unchecked, folder, name, expected, value):
    describe(folder, **{name: value})
    with pytest.raises(TokenizerError, match=rf"{name} is .*; expected one of {expected}$"):
        load_tokenizer(folder)


@pytest.mark.parametrize("role", ["begin_of_text", "end_of_text", "padding"])
@pytest.mark.parametrize("piece", [3, True, ["</s>"], {"content": "</s>"}], ids=repr)
def test_a_piece_is_named_by_its_text(unchecked, folder, role, piece):
    describe(folder, **{role: piece})
    with pytest.raises(TokenizerError, match=rf"{role} is .*; expected a piece"):
        load_tokenizer(folder)


@pytest.mark.parametrize("role", ["end_of_text", "padding"])
def test_only_the_begin_may_be_none(unchecked, role):
    with pytest.raises(TokenizerError, match=rf"{role} is None; expected a piece"):
        words(**{role: None})


@pytest.mark.parametrize(
    ("name", "role"),
    [("begin_of_text", "begin-of-text"), ("end_of_text", "end-of-text"), ("padding", "padding")],
)
@pytest.mark.parametrize("piece", ["<|endoftext|>", ""], ids=repr)
@pytest.mark.parametrize("make", kinds())
def test_a_piece_that_the_vocabulary_has_not_is_named(make, name, role, piece):
    tokenizer = make()
    config = replace(tokenizer.config, **{name: piece})
    with pytest.raises(TokenizerError, match=rf"the vocabulary has no {role} piece '"):
        Tokenizer(tokenizer.vocabulary, config)


@pytest.mark.parametrize(
    ("kind", "name"), [("sentencepiece", "sentencepiece.model"), ("tokenizer.json",) * 2]
)
def test_a_missing_vocabulary_is_named(tmp_path, kind, name):
    describe(tmp_path, kind=kind)
    with pytest.raises(TokenizerError, match=rf"{tmp_path / name} is missing"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        pytest.param(words, "tokenizer.json", "not a tokenizer.json", id="fast"),
        pytest.param(
            tiny_tokenizer, "sentencepiece.model", "not a SentencePiece model", id="sentencepiece"
        ),
    ],
)
def test_a_vocabulary_cut_short_is_refused(make, name, said, share, tmp_path):
    make().save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TokenizerError, match=rf"{said} \(\d+ bytes\)"):
        load_tokenizer(tmp_path)


def test_one_text_is_refused_where_a_list_is_expected():
    with pytest.raises(TokenizerError, match="the texts are one string, 'a cat'; expected a list"):
        words().encode("a cat")


@pytest.mark.parametrize("make", kinds())
def test_a_tokenizer_can_be_sent_to_a_worker_process(make):
    tokenizer = make()
    texts = [LONG, "红苹果 cat", ""]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(texts).ids.equal(tokenizer.encode(texts).ids)
    assert again.fingerprint == tokenizer.fingerprint


def test_a_folder_may_be_a_string(folder):
    assert load_tokenizer(str(folder)).fingerprint == load_tokenizer(folder).fingerprint


def test_an_exported_fast_tokenizer_is_kept_and_one_of_another_is_not(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    fast_files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    Tokenizer(tokenizer.vocabulary, tokenizer.config, fast_files=fast_files).save(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").fast_files == fast_files
    tokenizer.save(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").fast_files == {}
