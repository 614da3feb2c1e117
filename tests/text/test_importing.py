"""Tokenizers that others publish give the ids that their own code gives."""

import io
import json
import random
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import (
    Tokenizer as RustTokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.builders import THINGS, unique_captions
from vlm.errors import TokenizerError
from vlm.text.clip_bpe import clip_tokenizer
from vlm.text.importing import import_tokenizer
from vlm.text.tokenizer import load_tokenizer

BERT = (
    "[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", ",", "[", "]", "red", "apple",
    "##s", "un", "##a", "##able", "cafe", "红", "苹", "果", "##果", "，", "cls",
)  # fmt: skip
TEXTS = [text for pair in THINGS for text in pair]


@pytest.fixture(scope="module")
def captions(emoji):
    return unique_captions(emoji("val"), ["zh", "en"])


@pytest.fixture
def bert(tmp_path):
    """Write a small vocabulary of BERT; return its file."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(BERT) + "\n", encoding="utf-8")
    return path


def pieces_of(tokenizer, text: str) -> list[str]:
    pieces = tokenizer.vocabulary.pieces()
    return [pieces[token_id] for token_id in tokenizer.split([text])[0]]


@pytest.mark.slow
def test_clip_is_open_clips_vocabulary():
    own, shorter = clip_tokenizer(), import_tokenizer("clip", context_length=32)
    assert shorter.vocabulary.files() == own.vocabulary.files()
    assert shorter.config == replace(own.config, context_length=32)
    assert shorter.special_ids == own.special_ids


def test_a_folder_of_this_package_is_read_as_it_is(tmp_path, bert):
    tokenizer = import_tokenizer(str(bert))
    tokenizer.save(tmp_path / "saved")
    again = import_tokenizer(str(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
    changed = import_tokenizer(str(tmp_path / "saved"), padding="[SEP]")
    assert changed.special_ids.padding == changed.special_ids.end_of_text


def test_bert_has_chinese_clips_markers_and_length(bert):
    tokenizer = import_tokenizer(str(bert))
    assert (tokenizer.context_length, tokenizer.vocab_size) == (52, len(BERT))
    assert tokenizer.vocabulary.pieces() == [*BERT]
    special = tokenizer.special_ids
    assert (special.begin_of_text, special.end_of_text, special.padding) == (3, 4, 0)
    assert special.unknown == 2
    batch = tokenizer.encode(["red apples", "红"], pad_to=6)
    assert batch.ids.tolist() == [[3, 10, 11, 12, 4, 0], [3, 17, 4, 0, 0, 0]]
    assert import_tokenizer(str(bert), context_length=30).context_length == 30


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Red APPLES", ["red", "apple", "##s"]),
        ("unaable", ["un", "##a", "##able"]),
        ("café, CAFÉ", ["cafe", ",", "cafe"]),
        ("红苹果，red", ["红", "苹", "果", "，", "red"]),
        ("苹果red果", ["苹", "果", "red", "果"]),
        ("unred dog", ["[UNK]", "[UNK]"]),
        ("[CLS] [MASK]", ["[", "cls", "]", "[", "[UNK]", "]"]),
        ("r\u0000e\u200bd\tred", ["red", "red"]),
        ("un" + "a" * 198, ["un", *["##a"] * 198]),
        ("un" + "a" * 199, ["[UNK]"]),
        ("", []),
    ],
    ids=["case", "longest first", "accents", "Chinese", "mixed", "unknown", "markers",
         "control characters", "200 letters", "201 letters", "empty"],
)  # fmt: skip
def test_berts_rules_hold(bert, text, pieces):
    assert pieces_of(import_tokenizer(str(bert)), text) == pieces


@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=["none", "line feed", "Windows"])
def test_ids_of_bert_are_lines_however_they_end(bert, end):
    bert.write_bytes((end or "\n").join(BERT).encode() + end.encode())
    assert import_tokenizer(str(bert)).vocabulary.pieces() == [*BERT]


def test_bert_without_a_special_piece_is_refused_by_its_name(bert):
    bert.write_text("\n".join(piece for piece in BERT if piece not in ("[CLS]", "[MASK]")))
    with pytest.raises(
        TokenizerError, match=r"not a vocabulary of BERT: it lacks \[CLS\], \[MASK\]"
    ):
        import_tokenizer(str(bert))


@pytest.mark.parametrize("content", [b"", b"hello\nworld\n"], ids=["empty", "a text"])
def test_a_text_file_that_is_no_vocabulary_is_refused(bert, content):
    bert.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"vocab\.txt is not a vocabulary of BERT"):
        import_tokenizer(str(bert))


def test_a_vocabulary_that_is_not_utf8_is_refused(bert):
    bert.write_bytes("\n".join(BERT).encode("gb18030"))
    with pytest.raises(TokenizerError, match=r"vocab\.txt is not UTF-8 text: ."):
        import_tokenizer(str(bert))


@pytest.fixture(scope="module")
def cn_clip():
    return pytest.importorskip("cn_clip.clip", reason="Chinese-CLIP's package is not installed")


@pytest.fixture(scope="module")
def chinese_clip(cn_clip):
    return import_tokenizer(str(Path(cn_clip.__file__).with_name("vocab.txt")))


def blocks(*ranges: tuple[int, int]) -> list[str]:
    """Return the assigned characters of blocks that are no newer than either Unicode table.

    Python and the Rust library differ on private and unassigned characters, on marks and
    punctuation newer than one of their tables, on U+2B820 to U+2B91F, which Rust does not take
    for Chinese characters, and on a capital sigma that ends a word.
    """
    points = [point for first, last in ranges for point in range(first, last + 1)]
    return [c for c in map(chr, points) if unicodedata.category(c) not in ("Cn", "Co") and c != "Σ"]


CHARACTERS = {
    "Latin, Greek and Cyrillic": blocks((0x00, 0x52F), (0x1E00, 0x1FFF)),
    "punctuation and symbols": blocks((0x2000, 0x2BFF)),
    "Chinese punctuation, kana": blocks((0x3000, 0x33FF), (0xFE10, 0xFE6F)),
    "Chinese characters": blocks((0x3400, 0x4DB5), (0x4E00, 0x9FD5), (0xF900, 0xFAD9))[::3],
    "rare Chinese characters": blocks((0x20000, 0x2A6D6))[::61],
    "full width": blocks((0xFF00, 0xFFEF)),
    "Hangul": blocks((0x1100, 0x11FF), (0xAC00, 0xD7A3))[::7],
    "emoji": blocks((0x1F000, 0x1FAFF), (0xFE00, 0xFE0F), (0xE0020, 0xE007F)),
}


def chinese_clips_ids(cn_clip, texts):
    tokenizer = cn_clip._tokenizer
    return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]


@pytest.mark.parametrize("characters", CHARACTERS.values(), ids=CHARACTERS)
def test_characters_in_context_have_chinese_clips_ids(cn_clip, chinese_clip, characters):
    texts = [f"a{c}{c} x{c}!{c} {c}猫" for c in characters]
    expected = chinese_clips_ids(cn_clip, texts)
    rows = chinese_clip.split(texts)
    assert [
        t for t, ours, theirs in zip(texts, rows, expected, strict=True) if ours != theirs
    ] == []


def test_random_mixtures_have_chinese_clips_ids(cn_clip, chinese_clip):
    pick = random.Random(0)
    pools = [*CHARACTERS.values(), [" ", "  ", "\n", "\u3000"], [*"theandofing"], [*"的一是，。"]]
    texts = [
        "".join(pick.choice(pick.choice(pools)) for _ in range(pick.randrange(1, 30)))
        for _ in range(3000)
    ]
    assert chinese_clip.split(texts) == chinese_clips_ids(cn_clip, texts)


def test_batches_are_chinese_clips(cn_clip, chinese_clip, captions):
    long = ["".join(captions[start : start + 30]) for start in range(0, 300, 30)]
    texts = [*captions, *long, "", "[CLS] [SEP]", "A" * 300]
    batch = chinese_clip.encode(texts, pad_to=52)
    assert batch.ids.equal(cn_clip.tokenize(texts))
    assert batch.mask.equal(batch.ids.ne(0))
    assert batch.mask[len(captions) : -3].all()  # the long ones are cut
    assert chinese_clip.vocab_size == 21_128


@pytest.fixture(scope="module")
def model():
    """Train a SentencePiece model, as others do."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=buffer, vocab_size=120, pad_id=3,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return buffer.getvalue()


def test_a_sentencepiece_model_stands_between_its_own_markers(model, tmp_path):
    (tmp_path / "some.model").write_bytes(model)
    tokenizer = import_tokenizer(str(tmp_path / "some.model"), cleaning="lower")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    batch = tokenizer.encode(["RED APPLE", "小狗"])
    rows = [[1, *processor.encode(text), 2] for text in ("red apple", "小狗")]
    assert [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)] == rows
    assert tokenizer.special_ids.padding == 3
    assert (tokenizer.context_length, tokenizer.config.truncation) == (77, "right")
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def test_a_model_without_padding_asks_for_one(tmp_path):
    path = tmp_path / "some.model"
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=buffer, vocab_size=120, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(buffer.getvalue())
    with pytest.raises(TokenizerError, match=r"name its padding piece; name it with --padding$"):
        import_tokenizer(str(path))
    tokenizer = import_tokenizer(str(path), padding="<unk>")
    assert tokenizer.special_ids.begin_of_text is None
    assert tokenizer.special_ids.padding == 0


XLM_R = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def xlm_r(texts) -> RustTokenizer:
    """Make a tokenizer of XLM-R's kind: unigram pieces, spaces as `▁`, its own markers."""
    rust = RustTokenizer(models.Unigram())
    rust.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=[*XLM_R], unk_token="<unk>", show_progress=False
    )
    rust.train_from_iterator(texts, trainer)
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return rust


SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "special": True},
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "model_max_length": 512,
    "tokenizer_class": "XLMRobertaTokenizer",
}


@pytest.fixture(scope="module")
def rust(captions):
    return xlm_r(captions)


@pytest.fixture
def folder(rust, tmp_path):
    """Write a folder as Hugging Face does."""
    (tmp_path / "tokenizer.json").write_text(rust.to_str(), encoding="utf-8")
    settle(tmp_path, SETTINGS)
    return tmp_path


def settle(folder: Path, settings: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("name", ["", "tokenizer.json"], ids=["folder", "file"])
def test_a_folder_of_hugging_face_is_read_with_its_named_markers(folder, name, rust, captions):
    tokenizer = import_tokenizer(str(folder / name))
    special = tokenizer.special_ids
    assert (special.begin_of_text, special.padding, special.end_of_text) == (0, 1, 2)
    assert special.unknown == 3
    assert tokenizer.context_length == 512
    batch = tokenizer.encode(captions)
    for text, ids, mask in zip(captions, batch.ids, batch.mask, strict=True):
        assert ids[mask].tolist() == rust.encode(text).ids
    assert tokenizer.decode(batch.ids[-1].tolist()) == captions[-1]


def test_what_is_asked_for_comes_before_what_the_source_says(folder):
    changes = {"begin_of_text": "<mask>", "padding": "</s>", "context_length": 20}
    tokenizer = import_tokenizer(str(folder), **changes, truncation="left", cleaning="clip")
    special = tokenizer.special_ids
    assert (special.begin_of_text, special.end_of_text, special.padding) == (4, 2, 2)
    config = tokenizer.config
    assert (config.context_length, config.truncation, config.cleaning) == (20, "left", "clip")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bos_token": None}, {"begin_of_text": "<s>"}),
        ({"bos_token": None, "cls_token": None}, {"begin_of_text": None}),
        ({"eos_token": None, "sep_token": "<mask>"}, {"end_of_text": "<mask>"}),
        ({"truncation_side": "left"}, {"truncation": "left"}),
        ({"model_max_length": int(1e30)}, {"context_length": 77}),
        ({"model_max_length": None}, {"context_length": 77}),
        ({"model_max_length": 77.0}, {"context_length": 77}),
    ],
    ids=["cls", "no begin", "sep", "left", "endless", "no length", "a fraction"],
)
def test_settings_are_read_from_the_file_beside(folder, changes, expected):
    settle(folder, SETTINGS | changes)
    config = import_tokenizer(str(folder)).config
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "end_of_text and padding piece; name it with --end_of_text and --padding"),
        ({"eos_token": "</s>"}, "padding piece; name it with --padding"),
        ({"pad_token": "<pad>"}, "end_of_text piece; name it with --end_of_text"),
    ],
    ids=["nothing", "an end", "a padding"],
)
def test_markers_that_nobody_named_are_asked_for(folder, settings, said):
    settle(folder, settings)
    with pytest.raises(TokenizerError, match=f"does not name its {said}$"):
        import_tokenizer(str(folder))
    named = {"end_of_text": "</s>", "padding": "<pad>"}
    assert import_tokenizer(str(folder), **named).special_ids.end_of_text == 2


def test_a_tokenizer_json_alone_asks_for_its_markers(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="name it with --end_of_text and --padding"):
        import_tokenizer(str(folder))


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("piece", [7, {"text": "<s>"}, ["<s>"]], ids=repr)
def test_a_marker_that_is_no_piece_is_refused(unchecked, folder, role, piece):
    settle(folder, SETTINGS | {role: piece})
    with pytest.raises(TokenizerError, match=r"(begin_of_text|end_of_text|padding) is .*expected"):
        import_tokenizer(str(folder))


def test_a_marker_that_the_vocabulary_has_not_is_named(folder):
    settle(folder, SETTINGS | {"eos_token": "<|endoftext|>"})
    with pytest.raises(TokenizerError, match=r"no end-of-text piece '<\|endoftext\|>'"):
        import_tokenizer(str(folder))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"7", b'"a"', b"\xff\xfe"], ids=["empty", "cut", "number", "text", "x"]
)
def test_damaged_settings_are_named(folder, content):
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not a JSON object"):
        import_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"context_length": 2}, "context_length is 2; expected an integer, at least 3"),
        ({"context_length": "52"}, "context_length is '52'; expected an integer, at least 3"),
        ({"context_length": True}, "context_length is True; expected an integer, at least 3"),
        ({"truncation": "both"}, "truncation is 'both'; expected one of right, left"),
        ({"cleaning": "bert"}, "cleaning is 'bert'; expected one of none, lower, clip, glm, words"),
        ({"padding": "[NONE]"}, r"no padding piece '\[NONE\]'"),
    ],
    ids=str,
)
def test_a_wrong_change_is_refused_for_every_source(unchecked, bert, folder, model, changes, said):
    (folder / "some.model").write_bytes(model)
    for source in (bert, folder, folder / "some.model"):
        with pytest.raises(TokenizerError, match=said):
            import_tokenizer(str(source), **changes)


@pytest.mark.parametrize(
    "source", ["", "CLIP", "none/at/all", "none.model", "vocab.txt", "tokenizer.json"]
)
def test_a_source_that_is_not_there_says_what_could_be(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenizerError, match=rf"no tokenizer {source}; expected clip, a tokenizer"):
        import_tokenizer(source)
    with pytest.raises(TokenizerError, match="expected clip, a tokenizer folder, or a file"):
        import_tokenizer(str(tmp_path))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "merges.bpe").write_text("a b")
    with pytest.raises(
        TokenizerError, match=r"bpe is not a \.model, vocab\.txt or tokenizer\.json"
    ):
        import_tokenizer(str(tmp_path / "merges.bpe"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("some.model", "not a SentencePiece model"), ("tokenizer.json", "not a tokenizer.json")],
)
def test_a_damaged_file_is_refused(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(TokenizerError, match=rf"{said} \(2 bytes\)"):
        import_tokenizer(str(tmp_path / name))
