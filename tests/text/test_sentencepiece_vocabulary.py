"""Ids are SentencePiece's own, also where pieces were added or taken away."""

import io
import json
import random
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from tests.builders import THINGS, open_split, unique_captions
from tests.support.commands import ROOT
from vlm.errors import TokenizerError
from vlm.text.config import TokenizerConfig
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.tokenizer import Tokenizer, load_tokenizer
from vlm.text.vocabulary import NewPiece

TEXTS = [text for pair in THINGS for text in pair]
UNSEEN = "🦄 𠮷 unseen, 龘!"
_Piece = ModelProto.SentencePiece
KINDS = {
    "unigram": {"model_type": "unigram"},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True},
    "BPE": {"model_type": "bpe"},
    "BPE with bytes": {"model_type": "bpe", "byte_fallback": True},
}


@cache
def captions() -> list[str]:
    return unique_captions(open_split(ROOT / "data/emoji", "val"), ["zh", "en"])


@cache
def train(**options: object) -> bytes:
    """Train a model on captions, as SentencePiece's users do."""
    settings = {
        "vocab_size": 1800, "hard_vocab_limit": False, "pad_id": 0, "unk_id": 1, "bos_id": 2,
        "eos_id": 3, "num_threads": 1, "minloglevel": 2,
    } | options  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions(), *TEXTS * 9]), model_writer=model, **settings
    )
    return model.getvalue()


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request):
    return train(**request.param)


@pytest.fixture
def vocabulary(model):
    return SentencePieceVocabulary(model)


@pytest.fixture
def processor(model):
    """Return the same model as the library itself reads it."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def between_its_markers(model: bytes, *, context_length: int = 64) -> Tokenizer:
    vocabulary = SentencePieceVocabulary(model)
    config = TokenizerConfig(context_length=context_length, **vocabulary.special_pieces)
    return Tokenizer(vocabulary, config)


def hand_made(pieces, *, model_type: str, **types: int) -> SentencePieceVocabulary:
    """Make a model of scored pieces behind `<unk>`; `types` are by the piece."""
    proto = ModelProto()
    proto.trainer_spec.model_type = {"unigram": 1, "bpe": 2}[model_type]
    proto.normalizer_spec.add_dummy_prefix = False
    proto.pieces.add(piece="<unk>", score=0, type=_Piece.UNKNOWN)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score, type=types.get(piece, _Piece.NORMAL))
    return SentencePieceVocabulary(proto.SerializeToString())


def test_ids_are_sentencepieces_own(vocabulary, processor):
    texts = [*captions(), *TEXTS, UNSEEN, "", "  two  spaces ", "Ｗｉｄｔｈ", "a\nb"]
    assert vocabulary.encode(texts) == [processor.encode(text) for text in texts]


def test_spans_are_where_the_pieces_stand_in_the_text(vocabulary, processor):
    texts = [*captions(), UNSEEN, "", "  two  spaces ", "Ｗｉｄｔｈ", "a\nb"]
    for text, row, spans in zip(
        texts, vocabulary.encode(texts), vocabulary.spans(texts), strict=True
    ):
        assert len(spans) == len(row)
        for token_id, (start, end) in zip(row, spans, strict=True):
            if not processor.is_byte(token_id) and not processor.is_unknown(token_id):
                piece = processor.id_to_piece(token_id).replace("▁", " ").strip()
                said = unicodedata.normalize("NFKC", text[start:end]).strip()
                # A piece of nothing but the space before a text stands where what follows does.
                assert said == piece or (piece == "" and start == len(text) - len(text.lstrip()))


def test_pieces_of_one_character_stand_where_it_does():
    vocabulary = SentencePieceVocabulary(train(model_type="unigram", byte_fallback=True))
    (spans,) = vocabulary.spans(["a🦄㎏"])
    assert spans[-6:-2] == [(1, 2)] * 4
    assert spans[-2:] == [(2, 3)] * 2


def test_ids_stand_between_the_models_markers(model, processor):
    batch = between_its_markers(model).encode([*TEXTS, "", UNSEEN])
    for text, ids, mask in zip([*TEXTS, "", UNSEEN], batch.ids, batch.mask, strict=True):
        assert ids[mask].tolist() == [2, *processor.encode(text), 3]
        assert ids[~mask].eq(0).all()


def test_pieces_are_the_models(vocabulary, processor):
    assert len(vocabulary) == processor.get_piece_size() > 400
    assert vocabulary.pieces() == [processor.id_to_piece(i) for i in range(len(vocabulary))]
    assert [vocabulary.id_of(p) for p in vocabulary.pieces()] == [*range(len(vocabulary))]
    assert vocabulary.id_of("no such piece") is None
    assert vocabulary.id_of("<unk>") == 1


def test_special_pieces_are_the_models(vocabulary):
    assert vocabulary.special_pieces == {
        "begin_of_text": "<s>", "end_of_text": "</s>", "padding": "<pad>",
    }  # fmt: skip


@pytest.mark.parametrize("missing", [["pad_id"], ["bos_id", "pad_id"]], ids=str)
def test_special_pieces_that_a_model_has_not_are_not_said(missing):
    vocabulary = SentencePieceVocabulary(train(**dict.fromkeys(missing, -1), eos_id=0))
    left = {"bos_id": "begin_of_text", "eos_id": "end_of_text", "pad_id": "padding"}
    assert set(vocabulary.special_pieces) == {left[name] for name in left.keys() - set(missing)}


def test_special_pieces_may_have_other_names():
    names = {"bos_piece": "[CLS]", "eos_piece": "[SEP]", "pad_piece": "[PAD]"}
    vocabulary = SentencePieceVocabulary(train(**names))
    assert [*vocabulary.special_pieces.values()] == ["[CLS]", "[SEP]", "[PAD]"]
    assert [vocabulary.id_of(piece) for piece in names.values()] == [2, 3, 0]


def test_what_bytes_can_say_is_not_unknown(vocabulary, processor):
    bytes_say_it = processor.is_byte(4)
    assert vocabulary.unknown_id == (None if bytes_say_it else 1)
    assert (1 in vocabulary.encode([UNSEEN])[0]) != bytes_say_it


@pytest.mark.parametrize("text", ["<s>", "</s>", "<pad>", "<unk>", "x </s> y", "</s></s>"])
def test_a_text_that_looks_like_a_marker_becomes_none(text):
    vocabulary = SentencePieceVocabulary(train(model_type="unigram", byte_fallback=True))
    ids = vocabulary.encode([text])[0]
    assert not {0, 1, 2, 3} & set(ids)
    assert vocabulary.decode(ids) == text


def test_decoding_is_sentencepieces_own(vocabulary, processor):
    for ids in vocabulary.encode([*captions()[::20], UNSEEN, ""]):
        assert vocabulary.decode(ids) == processor.decode(ids)


def test_decoding_gives_the_text_back_without_markers_and_padding(model):
    tokenizer = between_its_markers(model)
    texts = [*TEXTS, ", ".join(en for en, _ in THINGS[:4])]
    batch = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in batch.ids.tolist()] == texts


@pytest.mark.parametrize("model", [b"", b"x", b"\0" * 100, b"{}"], ids=["empty", "x", "0", "JSON"])
def test_bytes_that_are_no_model_are_refused(model):
    with pytest.raises(TokenizerError, match=rf"not a SentencePiece model \({len(model)} bytes\)"):
        SentencePieceVocabulary(model)


def test_a_model_that_is_not_described_needs_its_own_markers(tmp_path):
    (tmp_path / "sentencepiece.model").write_bytes(train(bos_id=-1, eos_id=-1))
    description = {"kind": "sentencepiece", "context_length": 9}
    (tmp_path / "vlm_tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(TokenizerError, match=r"vlm_tokenizer\.json lacks .*'begin_of_text'"):
        load_tokenizer(tmp_path)


def new_pieces(*texts: str, probability: float = 0.1) -> list[NewPiece]:
    return [NewPiece(text, probability) for text in texts]


def test_new_pieces_leave_old_ids_where_they_are(vocabulary):
    grown = vocabulary.with_pieces(new_pieces("龘龘", "zyzzyva", "鱻"))
    assert grown.pieces() == [*vocabulary.pieces(), "龘龘", "zyzzyva", "鱻"]
    assert len(grown) == len(vocabulary) + 3
    assert grown.encode(captions()) == vocabulary.encode(captions())
    assert grown.special_pieces == vocabulary.special_pieces
    assert grown.unknown_id == vocabulary.unknown_id
    again = SentencePieceVocabulary(grown.files()["sentencepiece.model"])
    assert again.encode(["龘龘", "a zyzzyva"]) == grown.encode(["龘龘", "a zyzzyva"])


@pytest.mark.parametrize("text", ["鱻", "a 鱻 cat", "a鱻cat", "猫鱻", "鱻猫鱻"])
def test_a_new_piece_has_one_id_wherever_it_stands(vocabulary, text):
    row = vocabulary.with_pieces(new_pieces("鱻")).encode([text])[0]
    assert row.count(len(vocabulary)) == text.count("鱻")


def test_new_pieces_of_bpe_are_found_first_and_the_longest_from_the_left():
    vocabulary = SentencePieceVocabulary(train(model_type="bpe"))
    size = len(vocabulary)
    grown = vocabulary.with_pieces(new_pieces("鱻", "鱻龘", "龘鱻鱻"))
    rows = grown.encode(["鱻", "鱻龘", "鱻龘鱻鱻", "龘鱻鱻", "鱻鱻龘"])
    assert [[i - size for i in row if i >= size] for row in rows] == [
        [0], [1], [1, 0, 0], [2], [0, 1],
    ]  # fmt: skip


def test_new_pieces_of_unigram_score_the_logarithm_of_their_probability():
    pieces = [("a", -3.0), ("b", -3.0), ("ab", -5.0), ("z", -20.0)]
    vocabulary = hand_made(pieces, model_type="unigram")
    likely = vocabulary.with_pieces([NewPiece("abab", 0.001)])  # -6.9 is above twice -5
    rare = vocabulary.with_pieces([NewPiece("abab", 0.00001)])  # -11.5 is below
    assert (likely.encode(["ababab"]), rare.encode(["ababab"])) == ([[3, 5]], [[3, 3, 3]])


def test_what_is_unknown_does_not_become_dearer_by_a_rare_new_piece():
    pieces = [("ab", -15.0), ("c", -15.0), ("bc", -2.0)]  # unknown + `bc` is -27, `ab` + `c` -30
    vocabulary = hand_made(pieces, model_type="unigram")
    grown = vocabulary.with_pieces([NewPiece("z", 1e-30)])
    assert grown.encode(["abc"]) == vocabulary.encode(["abc"]) == [[0, 3]]


def test_pieces_can_be_added_twice_over(vocabulary):
    size = len(vocabulary)
    grown = vocabulary.with_pieces(new_pieces("鱻")).with_pieces(new_pieces("龘"))
    assert grown.pieces()[size:] == ["鱻", "龘"]
    assert [row[-1] for row in grown.encode(["a 鱻", "a 龘"])] == [size, size + 1]


@pytest.mark.parametrize("token_id", [1, 2, 400], ids=["unknown", "control", "normal"])
def test_a_piece_that_is_there_already_is_refused(vocabulary, token_id):
    taken = vocabulary.pieces()[token_id]
    with pytest.raises(TokenizerError, match=rf"duplicate pieces: {re.escape(taken)}$"):
        vocabulary.with_pieces(new_pieces("鱻", taken, "龘"))


def test_a_piece_that_is_added_twice_is_refused(vocabulary):
    with pytest.raises(TokenizerError, match=r"duplicate pieces: 鱻$"):
        vocabulary.with_pieces(new_pieces("鱻", "龘", "鱻"))


def check_reduced(vocabulary: SentencePieceVocabulary, texts: list[str]) -> list[int]:
    """Reduce to what texts use, compare, and return the old ids that were kept."""
    rows = vocabulary.encode(texts)
    reduced, kept = vocabulary.reduced_to(sorted({piece for row in rows for piece in row}))
    assert [[kept[i] for i in row] for row in reduced.encode(texts)] == rows
    assert kept == sorted(set(kept))
    pieces = vocabulary.pieces()
    assert reduced.pieces() == [pieces[i] for i in kept]
    unknown = reduced.unknown_id
    assert (None if unknown is None else kept[unknown]) == vocabulary.unknown_id
    return kept


def test_a_reduced_vocabulary_splits_the_kept_texts_as_before(vocabulary):
    kept = check_reduced(vocabulary, [*captions()[::9], UNSEEN])
    assert len(kept) < 0.8 * len(vocabulary)


def test_special_pieces_and_bytes_survive_a_reduction(vocabulary, processor):
    reduced, kept = vocabulary.reduced_to([])
    has_bytes = processor.is_byte(4)
    always = range(4 + 256) if has_bytes else range(4)
    assert kept[: len(always)] == [*always]
    assert len(kept) <= len(always) + 2  # the space and, in a unigram model, the worst piece
    assert reduced.special_pieces == vocabulary.special_pieces
    row = reduced.encode([UNSEEN])[0]
    assert (reduced.decode(row) == UNSEEN) if has_bytes else (1 in row)


def test_special_pieces_with_other_ids_survive_a_reduction():
    vocabulary = SentencePieceVocabulary(train(unk_id=0, bos_id=7, eos_id=9, pad_id=11))
    reduced, kept = vocabulary.reduced_to([20, 30])
    assert {0, 7, 9, 11, 20, 30} <= set(kept)
    assert reduced.special_pieces == vocabulary.special_pieces
    processor = sentencepiece.SentencePieceProcessor(
        model_proto=reduced.files()["sentencepiece.model"]
    )
    ids = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    assert [kept[i] for i in ids] == [0, 7, 9, 11]


def test_all_pieces_are_no_reduction(vocabulary):
    same, kept = vocabulary.reduced_to(range(len(vocabulary)))
    assert kept == [*range(len(vocabulary))]
    assert same.encode(captions()) == vocabulary.encode(captions())


def test_a_grown_vocabulary_is_reduced_to_its_new_pieces_too(vocabulary):
    grown = vocabulary.with_pieces(new_pieces("鱻", "鱻龘", "龘", probability=0.001))
    kept = check_reduced(grown, [*captions()[::9], "鱻龘 and 鱻"])
    assert {len(vocabulary), len(vocabulary) + 1} <= set(kept)
    assert len(vocabulary) + 2 not in kept


def test_a_piece_of_bpe_keeps_what_it_is_merged_from():
    scored = {"abc": -4.0, "bc": -1.0, "ab": -3.0, "a": -7.0, "b": -8.0, "c": -9.0, "d": -10.0}
    vocabulary = hand_made(scored.items(), model_type="bpe")
    _, kept = vocabulary.reduced_to([1])
    assert [vocabulary.pieces()[i] for i in kept] == ["<unk>", "abc", "bc", "a", "b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_reduced_random_models_split_texts_as_before(model_type):
    pick = random.Random(0)
    unknown = reductions = 0
    for _ in range(300):
        spelt = {"".join(pick.choices("abcd", k=pick.choice([1, 1, 2, 3]))) for _ in range(16)}
        pieces = [(piece, -pick.uniform(1, 30)) for piece in sorted(spelt)]
        vocabulary = hand_made(pieces, model_type=model_type)
        texts = ["".join(pick.choices("abcd", k=pick.randrange(1, 7))) for _ in range(4)]
        unknown += any(0 in row for row in vocabulary.encode(texts))
        reductions += len(check_reduced(vocabulary, texts)) < len(vocabulary)
    assert unknown > 30
    assert reductions > 100


def test_what_is_unknown_does_not_become_cheaper_by_a_reduction():
    # Without `a`, which no text uses, unknown + `bc` would cost less than `ab` + `c`.
    pieces = [("a", -40.0), ("ab", -15.0), ("c", -15.0), ("bc", -2.0)]
    vocabulary = hand_made(pieces, model_type="unigram")
    assert vocabulary.encode(["abc", "bc"]) == [[2, 3], [4]]
    check_reduced(vocabulary, ["abc", "bc"])


@pytest.mark.parametrize("count", [1024, 1025, 2600])
def test_a_large_batch_gives_what_its_texts_give_alone(vocabulary, count):
    texts = [f"{captions()[i % len(captions())]} {i}" for i in range(count)]
    assert vocabulary.encode(texts) == [vocabulary.encode([text])[0] for text in texts]


FORK = """
import os, sys
from pathlib import Path
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary

vocabulary = SentencePieceVocabulary.load(Path(sys.argv[1]))
texts = [f"a red apple {i}" for i in range(3000)]
expected = vocabulary.encode(texts)
child = os.fork()
if child == 0:
    os._exit(0 if vocabulary.encode(texts) == expected else 7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_encodes_after_its_parent_did(model, tmp_path):
    (tmp_path / "sentencepiece.model").write_bytes(model)
    process = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert process.stdout == "0\n"


APPENDED = [
    "<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", *(f"<|blank_{n}|>" for n in range(10, 1, -1)),
    "▁golden", "▁retrieve",
]  # fmt: skip


@pytest.fixture(scope="module")
def m2_processor():
    """Make M2-Encoder's model in miniature: GLM's Chinese pieces, then markers and words."""
    proto = ModelProto.FromString(
        train(
            model_type="bpe", normalization_rule_name="nmt_nfkc", add_dummy_prefix=True,
            remove_extra_whitespaces=False, byte_fallback=False, split_digits=True,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        )
    )  # fmt: skip
    for piece in APPENDED:
        proto.pieces.add(piece=piece, score=0.0, type=_Piece.USER_DEFINED)
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


@pytest.fixture(scope="module")
def m2(m2_processor, tmp_path_factory):
    """Describe it by hand, as one does with files that M2-Encoder publishes."""
    folder = tmp_path_factory.mktemp("m2")
    (folder / "sentencepiece.model").write_bytes(m2_processor.serialized_model_proto())
    (folder / "vlm_tokenizer.json").write_text(
        '{"kind": "sentencepiece", "context_length": 52, "begin_of_text": "[CLS]",'
        ' "end_of_text": "<|endoftext|>", "padding": "<|endoftext|>", "truncation": "left",'
        ' "cleaning": "glm"}'
    )
    return load_tokenizer(folder)


def m2_ids(processor, text: str) -> list[int]:
    """Follow the published rules: blanks the longest first, the last 50 between the markers."""
    for length in range(10, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    begin, end = processor.piece_to_id("[CLS]"), processor.piece_to_id("<|endoftext|>")
    return [begin, *processor.encode(text)[-50:], end]


def test_m2s_batches_follow_its_published_rules(m2, m2_processor):
    long = ", ".join(captions()[:40])
    texts = [*captions()[::7], *TEXTS, UNSEEN, "", long, f"{long}  {long}"]
    end = m2_processor.piece_to_id("<|endoftext|>")
    batch = m2.encode(texts, pad_to=52)
    for text, ids, mask in zip(texts, batch.ids.tolist(), batch.mask, strict=True):
        expected = m2_ids(m2_processor, text)
        assert ids == [*expected, *[end] * (52 - len(expected))]
        assert mask.tolist() == [True] * len(expected) + [False] * (52 - len(expected))


def test_m2s_long_text_keeps_its_last_tokens(m2, m2_processor):
    text = ", ".join(captions()[:40]) + " and a grey cat"
    ids = m2.encode([text]).ids[0].tolist()
    assert len(ids) == 52
    assert m2_processor.decode(ids[1:-1]).endswith(" and a grey cat")
    assert ids[1:-1] == m2_processor.encode(text)[-50:]


@pytest.mark.parametrize("length", range(1, 35))
def test_m2s_runs_of_spaces_are_the_longest_blanks_first(m2, m2_processor, length):
    row = m2.split([f"猫{' ' * length}猫"])[0]
    tens, rest = divmod(length, 10)
    blanks = [piece for piece in m2_processor.id_to_piece(row) if "blank" in piece]
    assert blanks == ["<|blank_10|>"] * tens + ([f"<|blank_{rest}|>"] if rest > 1 else [])
    assert m2.decode(row) == f"猫{' ' * length}猫"


def test_m2_folds_width_but_not_case(m2):
    same, other = m2.split(["Ｃａｔ１２，", "Cat12,"])
    assert same == other
    assert m2.split(["Cat"]) != m2.split(["cat"])


def test_m2s_unknown_characters_are_id_zero(m2):
    assert m2.special_ids.unknown == 0
    assert 0 in m2.split(["龘"])[0]
    assert 0 not in m2.split(["cat 猫"])[0]


def test_m2s_words_are_found_at_their_space(m2, m2_processor):
    golden, retrieve = (m2_processor.piece_to_id(f"▁{word}") for word in ("golden", "retrieve"))
    row = m2.split(["a golden retriever"])[0]
    assert row.index(golden) < row.index(retrieve)
    assert golden in m2.split(["golden"])[0]
    assert golden not in m2.split(["agolden"])[0]


def test_m2s_special_ids_are_those_of_its_description(m2, m2_processor):
    special = m2.special_ids
    assert special.begin_of_text == m2_processor.piece_to_id("[CLS]")
    assert special.end_of_text == special.padding == m2_processor.piece_to_id("<|endoftext|>")
    assert m2.vocab_size == m2_processor.get_piece_size()


def test_m2s_texts_come_back_from_its_batches(m2):
    texts = ["a golden cat", "红苹果", "two  spaces", ""]
    batch = m2.encode(texts, pad_to=52)
    assert [m2.decode(ids) for ids in batch.ids.tolist()] == texts


def test_m2_grows_and_shrinks_like_any_other(m2, m2_processor):
    grown = m2.vocabulary.with_pieces(new_pieces("鱻龘"))
    assert grown.encode(["鱻龘"])[0][-1] == m2.vocab_size
    kept = check_reduced(grown, m2_texts := [*captions()[::9], "a golden cat", "鱻龘"])
    assert len(kept) < m2.vocab_size
    marks = [m2_processor.piece_to_id(piece) for piece in ("[CLS]", "<|endoftext|>")]
    used = {piece for row in grown.encode(m2_texts) for piece in row}
    reduced, _ = grown.reduced_to(sorted(used | set(marks)))
    config = replace(m2.config, context_length=9)
    assert Tokenizer(reduced, config).encode(["cat"], pad_to=9).ids.shape == (1, 9)


def test_spelt_markers_of_m2_are_markers_as_they_are_to_sentencepiece(m2, m2_processor):
    for marker, text in product(["[MASK]", "<|endoftext|>"], ["{}", "a{}cat", "猫 {}"]):
        row = m2.split([text.format(marker)])[0]
        assert m2_processor.piece_to_id(marker) in row
        assert row == m2_processor.encode(text.format(marker))
