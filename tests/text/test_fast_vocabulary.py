"""A `tokenizer.json` gives the ids of the library that wrote it, grown and reduced as well."""

import json
import os
import random
import string
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import product

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as RustTokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.builders import unique_captions
from tests.support.commands import ROOT
from vlm.errors import TokenizerError
from vlm.text.fast_vocabulary import FastVocabulary
from vlm.text.vocabulary import NewPiece

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
KINDS = ("byte-level BPE", "BPE with word ends", "WordPiece", "Unigram", "WordLevel")


def train(kind: str, texts: list[str]) -> RustTokenizer:
    """Train a tokenizer as the library's users do."""
    options = {"vocab_size": 1500, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "byte-level BPE":
        rust = RustTokenizer(models.BPE())
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options
        )
    elif kind == "BPE with word ends":
        rust = RustTokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        rust.normalizer = normalizers.Lowercase()
        rust.pre_tokenizer = pre_tokenizers.Whitespace()
        rust.decoder = decoders.BPEDecoder(suffix="</w>")
        trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", limit_alphabet=400, **options)
    elif kind == "WordPiece":
        rust = RustTokenizer(models.WordPiece(unk_token="<unk>"))
        rust.normalizer = normalizers.BertNormalizer()
        rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        rust.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(limit_alphabet=400, **options)
    elif kind == "Unigram":
        rust = RustTokenizer(models.Unigram())
        rust.normalizer = normalizers.NFKC()
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        rust.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        rust = RustTokenizer(models.WordLevel(unk_token="<unk>"))
        rust.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**options)
    rust.train_from_iterator(texts, trainer)
    return rust


def vocabulary_of(rust: RustTokenizer) -> FastVocabulary:
    return FastVocabulary(rust.to_str().encode())


def words_of(pieces, special=(), **options) -> RustTokenizer:
    """Make a tokenizer of whole words, so that ids can be said by hand."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    rust = RustTokenizer(models.WordLevel(ids, unk_token="<unk>", **options))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.add_special_tokens(list(special))
    return rust


def merges_of(pieces, merges) -> RustTokenizer:
    """Make a byte-pair tokenizer of whole words from its pieces and merges."""
    ids = {piece: index for index, piece in enumerate(pieces)}
    rust = RustTokenizer(models.BPE(ids, merges))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return rust


@pytest.fixture(scope="module")
def captions(emoji):
    return unique_captions(emoji("val"), ["zh", "en"])


@pytest.fixture(scope="module", params=KINDS)
def rust(request, captions):
    return train(request.param, captions)


@pytest.fixture
def vocabulary(rust):
    return vocabulary_of(rust)


def test_ids_are_the_librarys_own(rust, vocabulary, captions):
    texts = [*captions, "", "  two  spaces ", "ＷＩＤＴＨ Case", "🦄 unseen 龘", "a\nb"]
    expected = [rust.encode(text, add_special_tokens=False).ids for text in texts]
    assert vocabulary.encode(texts) == expected
    assert len({piece for row in expected for piece in row}) > 300


def plain(text):
    """Return what a text and its piece agree in: some vocabularies normalise, and lower case."""
    return unicodedata.normalize("NFKC", text).strip().casefold()


def test_spans_are_where_the_pieces_stand_in_the_text(vocabulary, captions):
    texts = [*captions[::7], "", "  two  spaces ", "Case", "a\nb"]
    ids, spans = vocabulary.encode(texts), vocabulary.spans(texts)
    assert [*map(len, spans)] == [*map(len, ids)]
    said = 0
    for text, row, places in zip(texts, ids, spans, strict=True):
        for token_id, (start, end) in zip(row, places, strict=True):
            piece = vocabulary.decode([token_id]).removeprefix("##").strip()
            # A space before the text, or a part of a character, says nothing that can be compared.
            if piece and "\ufffd" not in piece and token_id != vocabulary.unknown_id:
                assert plain(text[start:end]) == plain(piece)
                said += 1
    assert said > 100


def test_a_special_word_has_one_span():
    rust = RustTokenizer(models.BPE({c: i for i, c in enumerate("a<e>")}, []))
    rust.pre_tokenizer = pre_tokenizers.Split(Regex(r"<e>|\S"), behavior="removed", invert=True)
    rust.add_special_tokens([AddedToken("<e>", normalized=False)])
    vocabulary = vocabulary_of(rust)
    assert vocabulary.encode(["a <e>a"]) == [[0, 4, 0]]
    assert vocabulary.spans(["a <e>a", "a"]) == [[(0, 1), (2, 5), (5, 6)], [(0, 1)]]


def test_pieces_are_numbered_without_gaps(rust, vocabulary):
    assert len(vocabulary) == rust.get_vocab_size() > 600
    assert vocabulary.pieces() == [rust.id_to_token(i) for i in range(len(vocabulary))]
    assert [vocabulary.id_of(p) for p in vocabulary.pieces()] == [*range(len(vocabulary))]
    assert vocabulary.id_of("no such piece") is None


def test_decoding_is_the_librarys_own(rust, vocabulary, captions):
    for row in vocabulary.encode(captions[::20]):
        assert vocabulary.decode(row) == rust.decode(row, skip_special_tokens=False)
    assert vocabulary.decode([]) == ""


def test_its_file_is_the_one_that_was_read(rust, vocabulary):
    assert vocabulary.files() == {"tokenizer.json": rust.to_str().encode()}


def test_markers_truncation_and_padding_of_the_file_are_not_used(rust, captions):
    other = RustTokenizer.from_str(rust.to_str())
    other.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    other.enable_truncation(3)
    other.enable_padding(pad_id=3, pad_token="<pad>", length=9)
    assert len(other.encode(captions[0]).ids) == 9
    assert vocabulary_of(other).encode(captions[::9]) == vocabulary_of(rust).encode(captions[::9])


def test_a_spelt_special_piece_is_the_characters_it_is_but_to_a_unigram_model(rust, vocabulary):
    among_the_pieces = isinstance(rust.model, models.Unigram)
    for special, text in product(SPECIAL[1:], ["{}", "a {} cat", "a{}", "{}{}"]):
        row = vocabulary.encode([text.format(special, special)])[0]
        assert (rust.token_to_id(special) in row) == among_the_pieces


@pytest.mark.parametrize(
    ("definition", "unknown"),
    [
        (models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"), 1),
        (models.BPE({"a": 0, "<unk>": 1}, []), None),
        (models.WordPiece({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"), 2),
        (models.WordLevel({"a": 0, "?": 1}, unk_token="?"), 1),
        (models.Unigram([("a", -1.0), ("<unk>", 0.0)], unk_id=1), 1),
        (models.Unigram([("<unk>", 0.0), ("<0x41>", -1.0)], unk_id=0, byte_fallback=True), None),
    ],
    ids=["BPE", "BPE without", "WordPiece", "WordLevel", "Unigram", "Unigram with bytes"],
)
def test_the_unknown_piece_is_the_models(definition, unknown):
    assert vocabulary_of(RustTokenizer(definition)).unknown_id == unknown


def test_a_marker_that_is_a_word_to_the_file_is_the_marker():
    rust = words_of(["a", "<unk>", "cat"], special=["[SEP]"])
    texts = ["a [SEP] cat", "[SEP]", "dog [SEP] dog", "dog", "a[SEP] cat", "[SEP]x [sep]"]
    assert vocabulary_of(rust).encode(texts) == [
        [0, 3, 2], [3], [1, 3, 1], [1], [1, 2], [1, 1],
    ]  # fmt: skip


def test_a_marker_within_a_word_is_the_characters_it_is():
    rust = merges_of(["a", "<", "e", ">"], [])
    rust.add_special_tokens(["<e>"])
    assert vocabulary_of(rust).encode(["<e> a<e>a <e>", "<e><e>"]) == [
        [4, 0, 1, 2, 3, 0, 4], [1, 2, 3, 1, 2, 3],
    ]  # fmt: skip


def new_pieces(*texts: str) -> list[NewPiece]:
    return [NewPiece(text, 0.1) for text in texts]


def test_new_pieces_leave_old_ids_where_they_are(vocabulary, captions):
    grown = vocabulary.with_pieces(new_pieces("龘龘", "zyzzyva", "鱻"))
    assert grown.pieces() == [*vocabulary.pieces(), "龘龘", "zyzzyva", "鱻"]
    assert len(grown) == len(vocabulary) + 3
    assert grown.encode(captions) == vocabulary.encode(captions)
    assert grown.unknown_id == vocabulary.unknown_id
    again = FastVocabulary(grown.files()["tokenizer.json"])
    assert again.encode(["龘龘", "a zyzzyva"]) == grown.encode(["龘龘", "a zyzzyva"])


def test_new_pieces_are_found_first_and_the_longest_from_the_left(vocabulary):
    size = len(vocabulary)
    grown = vocabulary.with_pieces(new_pieces("鱻", "鱻龘", "龘鱻鱻"))
    rows = grown.encode(["鱻", "鱻龘", "鱻龘鱻鱻", "龘鱻鱻", "鱻鱻龘"])
    assert [[i - size for i in row if i >= size] for row in rows] == [
        [0], [1], [1, 0, 0], [2], [0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["鱻", "a 鱻 cat", "a鱻cat", "猫鱻", "鱻猫鱻"])
def test_a_new_piece_has_one_id_wherever_it_stands(vocabulary, text):
    grown = vocabulary.with_pieces(new_pieces("鱻"))
    row = grown.encode([text])[0]
    assert row.count(len(vocabulary)) == text.count("鱻")


@pytest.mark.parametrize("text", ["zyzzyva", "ZYZZYVA", "ｚｙｚｚｙｖａ"])
def test_a_new_piece_is_found_in_what_the_file_makes_of_a_text(rust, vocabulary, text):
    grown = vocabulary.with_pieces(new_pieces("zyzzyva"))
    made = text if rust.normalizer is None else rust.normalizer.normalize_str(text)
    assert (len(vocabulary) in grown.encode([text])[0]) == (made == "zyzzyva")


def test_pieces_can_be_added_twice_over(vocabulary):
    size = len(vocabulary)
    grown = vocabulary.with_pieces(new_pieces("鱻")).with_pieces(new_pieces("龘"))
    assert grown.pieces()[size:] == ["鱻", "龘"]
    assert [row[-1] for row in grown.encode(["a 鱻", "a 龘"])] == [size, size + 1]


def test_a_piece_that_is_there_already_is_refused(vocabulary):
    taken = vocabulary.pieces()[len(vocabulary) // 2]
    with pytest.raises(TokenizerError, match="duplicate pieces: ") as refusal:
        vocabulary.with_pieces(new_pieces("鱻", taken, "龘"))
    assert str(refusal.value).endswith(f": {taken}")
    with pytest.raises(TokenizerError, match=r"duplicate pieces: 鱻$"):
        vocabulary.with_pieces(new_pieces("鱻", "龘", "鱻"))


def test_a_vocabulary_that_leaves_out_ids_is_not_extended():
    rust = RustTokenizer(models.WordLevel({"a": 0, "b": 1, "c": 5}, unk_token="a"))
    vocabulary = vocabulary_of(rust)
    assert vocabulary.pieces() == ["a", "b", "", "", "", "c"]
    with pytest.raises(TokenizerError, match="the vocabulary has gaps in its ids"):
        vocabulary.with_pieces(new_pieces("d"))


def check_reduced(vocabulary: FastVocabulary, texts: list[str]) -> list[int]:
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


def test_a_reduced_vocabulary_splits_the_kept_texts_as_before(vocabulary, captions):
    texts = [*captions[::9], "龘 unseen?"]
    kept = check_reduced(vocabulary, texts)
    assert {piece for row in vocabulary.encode(texts) for piece in row} <= set(kept)
    assert len(kept) < 0.8 * len(vocabulary)


def test_special_pieces_survive_a_reduction(vocabulary):
    reduced, kept = vocabulary.reduced_to([])
    assert kept[:4] == [vocabulary.id_of(piece) for piece in SPECIAL] == [0, 1, 2, 3]
    assert [reduced.id_of(piece) for piece in SPECIAL] == [0, 1, 2, 3]


def test_all_pieces_are_no_reduction(vocabulary, captions):
    same, kept = vocabulary.reduced_to(range(len(vocabulary)))
    assert kept == [*range(len(vocabulary))]
    assert same.encode(captions) == vocabulary.encode(captions)


def test_a_grown_vocabulary_is_reduced_to_its_new_pieces_too(vocabulary, captions):
    grown = vocabulary.with_pieces(new_pieces("鱻", "鱻龘", "龘"))
    kept = check_reduced(grown, [*captions[::9], "鱻龘 and 鱻"])
    assert len(vocabulary) in kept
    assert len(vocabulary) + 2 not in kept


def test_single_bytes_survive_a_reduction(captions):
    vocabulary = vocabulary_of(train("byte-level BPE", captions))
    reduced, _ = vocabulary.reduced_to([])
    assert len(reduced) == 256 + len(SPECIAL)
    assert reduced.decode(reduced.encode(["𠮷 🦄"])[0]) == "𠮷 🦄"


def test_bytes_and_the_space_of_a_unigram_model_survive_a_reduction():
    pieces = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("a", -1.0)]
    pieces += [("▁", -2.0), ("b", -2.0)]
    rust = RustTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    reduced, kept = vocabulary_of(rust).reduced_to([257])
    assert kept == [*range(259)]
    assert reduced.unknown_id is None
    assert reduced.decode(reduced.encode(["a猫b c"])[0]) == "a猫b c"


def test_what_several_merges_make_keeps_the_one_that_comes_first():
    # `abc` is made by a+bc, because b+c comes before a+b, although ab+c comes before a+bc.
    pieces = [*"abcd", "bc", "cd", "ab", "abc"]
    merges = [("b", "c"), ("c", "d"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    assert pieces.index("bc") in check_reduced(
        vocabulary_of(merges_of(pieces, merges)), ["abcd", "cd", "ab"]
    )


@pytest.mark.parametrize("suffix", [None, "</w>"], ids=["plain", "with word ends"])
def test_reduced_random_merges_split_texts_as_before(suffix):
    pick = random.Random(0)
    reductions = Counter()
    for _ in range(150):
        ends = [letter + suffix for letter in "abc"] if suffix else []
        pieces, merges = [*"abc", *ends], []
        for _ in range(25):
            left, right = pick.choice(pieces), pick.choice(pieces)
            if (left, right) not in merges and not (suffix and left.endswith(suffix)):
                merges.append((left, right))
                pieces += [left + right] if left + right not in pieces else []
        ids = {piece: index for index, piece in enumerate(pieces)}
        options = {"end_of_word_suffix": suffix} if suffix else {}
        rust = RustTokenizer(models.BPE(ids, merges, **options))
        rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        texts = ["".join(pick.choices("abc", k=pick.randrange(1, 9))) for _ in range(5)]
        kept = check_reduced(vocabulary_of(rust), texts)
        reductions[len(kept) < len(pieces)] += 1
    assert reductions[True] > 100


def test_reduced_random_unigrams_split_texts_as_before():
    pick = random.Random(0)
    unknown = 0
    for _ in range(300):
        spelt = {"".join(pick.choices("abcd", k=pick.choice([1, 1, 2, 3]))) for _ in range(16)}
        scored = [(piece, -pick.uniform(1, 30)) for piece in sorted(spelt)]
        rust = RustTokenizer(models.Unigram([("<unk>", 0.0), *scored], unk_id=0))
        texts = ["".join(pick.choices("abcd", k=pick.randrange(1, 7))) for _ in range(4)]
        vocabulary = vocabulary_of(rust)
        unknown += any(0 in row for row in vocabulary.encode(texts))
        check_reduced(vocabulary, texts)
    assert unknown > 30


def test_what_is_unknown_does_not_become_cheaper_by_a_reduction():
    # Without `a`, which no text uses, unknown + `bc` would cost less than `ab` + `c`.
    pieces = [("<unk>", 0.0), ("a", -40.0), ("ab", -15.0), ("c", -15.0), ("bc", -2.0)]
    vocabulary = vocabulary_of(RustTokenizer(models.Unigram(pieces, unk_id=0)))
    assert vocabulary.encode(["abc", "bc"]) == [[2, 3], [4]]
    check_reduced(vocabulary, ["abc", "bc"])


def older(definition: bytes) -> bytes:
    """Write a file as the library did before it named models and listed merges as pairs."""
    record = json.loads(definition)
    del record["model"]["type"], record["added_tokens"]
    record["model"]["merges"] = [" ".join(merge) for merge in record["model"]["merges"]]
    return json.dumps(record).encode()


def test_an_older_file_is_read_and_reduced_as_a_newer_one():
    pieces = [*"abcd", "bc", "ab", "abc"]
    rust = merges_of(pieces, [("b", "c"), ("a", "b"), ("a", "bc")])
    vocabulary = FastVocabulary(older(rust.to_str().encode()))
    assert vocabulary.encode(["abcd ab"]) == vocabulary_of(rust).encode(["abcd ab"])
    assert vocabulary.unknown_id is None
    check_reduced(vocabulary, ["abcd"])


def test_merges_that_mark_the_inside_of_a_word_are_not_reduced():
    model = models.BPE({"a": 0, "##a": 1, "aa": 2}, [("a", "##a")], continuing_subword_prefix="##")
    vocabulary = vocabulary_of(RustTokenizer(model))
    assert vocabulary.encode(["aa"]) == [[2]]
    with pytest.raises(TokenizerError, match="cannot reduce byte-pair merges that mark"):
        vocabulary.reduced_to([2])


@pytest.mark.parametrize(
    "definition",
    [b"", b"{", b"[]", b"null", b"{}", b'{"model": {}}', b"\xff\xfe", b'{"a": 0, "b": 1}'],
    ids=["empty", "cut off", "a list", "null", "no model", "no kind", "not UTF-8", "vocab.json"],
)
def test_what_is_no_tokenizer_json_is_refused_with_its_size(definition):
    with pytest.raises(
        TokenizerError, match=rf"not a tokenizer\.json \({len(definition)} bytes\): ."
    ):
        FastVocabulary(definition)


def test_merges_of_pieces_that_are_not_there_are_refused(captions):
    record = json.loads(train("byte-level BPE", captions).to_str())
    del record["model"]["vocab"]["a"]
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json .* out of vocabulary"):
        FastVocabulary(json.dumps(record).encode())


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0}, unk_token="<unk>"),
        models.WordPiece({"a": 0}, unk_token="<unk>"),
        models.BPE({"a": 0}, [], unk_token="<unk>"),
        models.Unigram([("a", 0.0)]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_text_that_a_file_cannot_split_is_an_error_of_the_tokenizer(model):
    vocabulary = vocabulary_of(RustTokenizer(model))
    assert vocabulary.unknown_id is None
    assert vocabulary.encode(["a"]) == [[0]]
    with pytest.raises(TokenizerError, match=r"the tokenizer cannot split a text: .*[Uu][Nn][Kk]"):
        vocabulary.encode(["a", "b"])


@pytest.mark.parametrize("count", [1023, 1024, 1025, 2600])
def test_a_large_batch_gives_what_its_texts_give_alone(rust, monkeypatch, captions, count):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    vocabulary = vocabulary_of(rust)
    texts = [f"{captions[i % len(captions)]} {i}" for i in range(count)]
    assert vocabulary.encode(texts) == [vocabulary.encode([text])[0] for text in texts]


FORK = """
import os, sys
from pathlib import Path
from vlm.text.fast_vocabulary import FastVocabulary

vocabulary = FastVocabulary.load(Path(sys.argv[1]))
os.cpu_count = lambda: 3
texts = [f"a red apple {i}" for i in range(3000)]
expected = vocabulary.encode(texts)
child = os.fork()
if child == 0:
    os._exit(0 if vocabulary.encode(texts) == expected else 7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_encodes_after_its_parent_did(vocabulary, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(vocabulary.files()["tokenizer.json"])
    # In a process of its own, where the library's threads are not turned off, as open_clip does.
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    process = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert process.stdout == "0\n"


def test_a_hundred_random_texts_are_split_as_the_library_does(rust, vocabulary):
    pick = random.Random(0)
    pool = [*string.printable, *"苹果猫狗的。，！", "😀", "é", "  ", "ａ"]
    texts = ["".join(pick.choices(pool, k=12)) for _ in range(100)]
    expected = [rust.encode(text, add_special_tokens=False).ids for text in texts]
    assert vocabulary.encode(texts) == expected
