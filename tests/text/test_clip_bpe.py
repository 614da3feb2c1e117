"""Ids are those of open_clip's `SimpleTokenizer`, whatever the text."""

import gzip
import random
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.tokenizer import default_bpe

from tests.builders import unique_captions
from vlm.errors import TokenizerError
from vlm.text.clip_bpe import clip_tokenizer

pytestmark = pytest.mark.peer

BEGIN, END = 49_406, 49_407
NASTY = (
    "&amp;", "&lt;", "&#39;", "&nbsp;", "&amp;amp;", "&EACUTE;", "&#x1F600;", "Ã©", "â€™", "ï¼Œ",
    "\x00", "\x1b[31m", "\x85", "\u2028", "\u200b", "\u200d", "\ufeff", "\ufffd",
    "<start_of_text>", "<END_OF_TEXT>", "<end_of_text>", "<ſtart_of_text>", "<Start_Of_Text>",
    "start_of_text", "<", ">", "'S", "'s", "'ſ", "'Ve", "'LL", "'", "''", "\u0345", "ᾳ", "ΐ",
    "😀", "👍🏽", "👨‍👩‍👧", "🏳️‍🌈", "🇨🇳", "한국", "ᄒ", "\u11ab", "привет", "Привет",
    "שלום", "苹果", "猫", "，", "。", "＆", "ａ", "１", "①", "½", "Ⅷ", "²", "ﬁ", "ß", "ẞ", "İ",
    "ı", "K", "ſ", "Σ", "ΟΔΟΣ", "\u0301", "e\u0301", "ｶﾞ", "ก็", "हिन्दी", "ǅ", "\ue000",
    "\U000e0001", "\U000f0000", "𠮷", "𝒜", "\u0378", "\U0001f8ff", " ", "  ", "\t", "\r\n",
    "\u3000", "!", "?", "مرحبا", "...", "—", "“", "’", "_", "#", "@", "$", "€", "</w>", "a", "B",
    "the", "photo", "dog", "3", "2024",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(clip):
    return clip


@pytest.fixture(scope="module")
def open_clips():
    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def nasty_texts():
    pick = random.Random(0)
    return ["".join(pick.choices(NASTY, k=pick.randrange(1, 14))) for _ in range(6000)]


@pytest.fixture(scope="module")
def captions(emoji):
    return unique_captions(emoji("train"), ["zh", "en"])


def differing(tokenizer, open_clips, texts):
    """Return the texts that the two split otherwise, with both results; at most five."""
    rows = tokenizer.split(texts)
    expected = map(open_clips.encode, texts)
    triples = zip(texts, rows, expected, strict=True)
    return [triple for triple in triples if triple[1] != triple[2]][:5]


def test_the_vocabulary_is_clips(tokenizer, open_clips):
    assert tokenizer.vocab_size == open_clips.vocab_size == 49_408
    assert tokenizer.context_length == open_clips.context_length == 77
    pieces = tokenizer.vocabulary.pieces()
    assert pieces == [open_clips.decoder[i] for i in range(49_408)]
    assert [tokenizer.vocabulary.id_of(piece) for piece in pieces[::97]] == [*range(0, 49_408, 97)]


def test_special_ids_are_clips(tokenizer, open_clips):
    special = tokenizer.special_ids
    assert (special.begin_of_text, special.end_of_text) == (BEGIN, END)
    assert [special.begin_of_text, special.end_of_text] == open_clips.all_special_ids
    assert (special.padding, special.unknown) == (0, None)


@pytest.mark.parametrize(
    ("text", "ids"),
    [("a photo of a cat", [320, 1125, 539, 320, 2368]), ("hello world!", [3306, 1002, 256])],
)
def test_well_known_texts_have_their_published_ids(tokenizer, text, ids):
    assert tokenizer.split([text]) == [ids]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_captions_are_split_and_padded_as_open_clip_does(tokenizer, open_clips, captions):
    assert len(captions) > 10_000
    expected = open_clips(captions)
    batch = tokenizer.encode(captions, pad_to=77)
    assert batch.ids.equal(expected)
    ends = expected.argmax(dim=1)  # the end has the highest id
    assert ends.max() < 76  # nothing was cut
    assert batch.mask.sum(dim=1).equal(ends + 1)
    rows = zip(expected.tolist(), ends.tolist(), strict=True)
    assert tokenizer.split(captions) == [ids[1:end] for ids, end in rows]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_every_character_in_context_is_split_as_open_clip_does(tokenizer, open_clips):
    points = [*range(0xD800), *range(0xE000, 0x10000), *range(0x1F000, 0x1FB00)]
    points += range(0x10000, 0x110000, 61)
    contexts = [f"a{c}{c} '{c}!{c}" for c in map(chr, points)]
    texts = [" ".join(contexts[start : start + 8]) for start in range(0, len(contexts), 8)]
    assert not differing(tokenizer, open_clips, texts)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_nasty_texts_are_split_as_open_clip_does(tokenizer, open_clips, nasty_texts):
    assert not differing(tokenizer, open_clips, nasty_texts)


def test_batches_of_nasty_texts_are_open_clips(tokenizer, open_clips, nasty_texts):
    texts = ["".join(nasty_texts[i : i + 1 + i % 7]) for i in range(0, 6000, 6)]
    batch = tokenizer.encode(texts, pad_to=77)
    assert batch.ids.equal(open_clips(texts))
    assert 100 < batch.mask.all(dim=1).sum() < 900  # some are cut
    assert (batch.mask | batch.ids.eq(0)).all()


@pytest.mark.parametrize("length", [75, 76, 200], ids=["fits", "one too many", "many too many"])
def test_a_long_text_loses_its_tail_and_keeps_its_end(tokenizer, open_clips, length):
    text = " ".join(["cat", "dog", "!"][i % 3] for i in range(length))
    batch = tokenizer.encode([text])
    assert batch.ids.equal(open_clips([text]))
    assert batch.mask.all()
    assert batch.ids[0, -1] == END


@pytest.mark.parametrize("context_length", [3, 16, 77])
def test_another_context_is_open_clips(tokenizer, open_clips, captions, context_length):
    config = {"context_length": context_length}
    shorter = type(tokenizer)(tokenizer.vocabulary, replace(tokenizer.config, **config))
    batch = shorter.encode(captions[::50], pad_to=context_length)
    assert batch.ids.equal(open_clips(captions[::50], context_length))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<start_of_text>", [BEGIN]),
        ("<END_OF_TEXT> <start_of_text>", [END, BEGIN]),
        ("<end_of_text><end_of_text>", [END, END]),
        ("cat<end_of_text>2", [2368, END, 273]),
    ],
)
def test_a_spelt_marker_is_the_marker_as_it_is_to_open_clip(tokenizer, open_clips, text, ids):
    assert tokenizer.split([text]) == [open_clips.encode(text)] == [ids]


@pytest.mark.parametrize("text", ["!<end_of_text>", "<ſtart_of_text>", "<end_of_text"])
def test_a_marker_that_is_no_word_is_the_characters_it_is(tokenizer, open_clips, text):
    ids = tokenizer.split([text])[0]
    assert ids == open_clips.encode(text)
    assert not {BEGIN, END} & set(ids)


def test_decoding_is_open_clips(tokenizer, open_clips, nasty_texts, captions):
    for text in [*nasty_texts[:2000], *captions[::10]]:
        ids = open_clips.encode(text)
        assert tokenizer.vocabulary.decode(ids) == open_clips.decode(ids).removesuffix(" ")


def test_decoding_gives_words_back(tokenizer):
    texts = ["a photo of a cat", "红苹果", "😀 👍🏽", "!", "! ! (!) !?", "", "don't"]
    batch = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in batch.ids.tolist()] == [
        "a photo of a cat", "红苹果", "😀 👍🏽", "!", "! ! (!) !?", "", "don 't",
    ]  # fmt: skip


def test_half_a_character_is_decoded_as_replaced(tokenizer, open_clips):
    ids = tokenizer.split(["猫"])[0]
    assert len(ids) > 1
    assert tokenizer.vocabulary.decode(ids[:1]) == open_clips.decode(ids[:1])


def test_ids_lie_in_the_vocabulary(tokenizer, nasty_texts):
    ids = tokenizer.encode(nasty_texts[:500]).ids
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size


def test_merges_can_come_from_another_file(tokenizer, tmp_path):
    other = tmp_path / "merges.gz"
    lines = gzip.decompress(Path(default_bpe()).read_bytes())
    other.write_bytes(gzip.compress(lines))
    assert clip_tokenizer(other).fingerprint == tokenizer.fingerprint


def damage(content: bytes) -> dict[str, bytes]:
    lines = gzip.decompress(content).decode().split("\n")
    return {
        "empty": b"",
        "no gzip": b"#version: 0.2\na b\n",
        "cut off": content[:-100_000],
        "a changed byte": content[:5000] + bytes([content[5000] ^ 0xFF]) + content[5001:],
        "not UTF-8": gzip.compress(b"\n\xff\xfe b\n"),
        "one too few": gzip.compress("\n".join(lines[:48_894]).encode()),
        "too few": gzip.compress("\n".join(lines[:100]).encode() + b"\n"),
        "three parts": gzip.compress("\n".join([*lines[:9], "a b c", *lines[10:]]).encode()),
        "unknown parts": gzip.compress("\n".join([*lines[:9], "猫 狗", *lines[10:]]).encode()),
    }


DAMAGE = damage(Path(default_bpe()).read_bytes())


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_list_of_merges_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "merges.gz").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"merges\.gz is not a gzipped list of CLIP's merges"):
        clip_tokenizer(tmp_path / "merges.gz")


def test_a_missing_list_of_merges_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"none\.gz is not a gzipped list of CLIP's merges"):
        clip_tokenizer(tmp_path / "none.gz")
