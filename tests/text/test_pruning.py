"""A pruned tokenizer splits its texts as before, with the rows of the embedding to match."""

import io
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import sentencepiece
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer as RustTokenizer, decoders, models, normalizers, pre_tokenizers

from tests.builders import unique_captions
from vlm.errors import TokenizerError
from vlm.text.clip_bpe import clip_tokenizer
from vlm.text.config import SentencePieceConfig, TokenizerConfig
from vlm.text.extension import extend
from vlm.text.fast_vocabulary import FastVocabulary
from vlm.text.pruning import count_ids, prune
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.tokenizer import Tokenizer, load_tokenizer
from vlm.text.training import train_sentencepiece
from vlm.text.word_lists import count_words, shares

EMOJI = Path(__file__).parents[2] / "data" / "emoji"
UNSEEN = ("An entirely unseen sentence: 1,234 zebras…", "完全没见过的句子，龘！", "привет 🦓")


@pytest.fixture(scope="module")
def texts(emoji):
    """Return the captions of a split in both languages, and some that are no plain ones."""
    captions = unique_captions(emoji("test_style"), ["zh", "en"])[:400]
    hard = ["", " ", "T恤 and 𠮷野家 <end_of_text>", "ñandú 🦄 \u200d ① x²", "é" * 20, "ab" * 60]
    return [*captions, *hard]


@pytest.fixture(scope="module")
def train_captions(emoji):
    split = emoji("train")
    return {language: unique_captions(split, [language])[:1500] for language in ("zh", "en")}


def clip(_) -> Tokenizer:
    return clip_tokenizer()


def extended_clip(captions) -> Tokenizer:
    words = shares(count_words(captions["zh"]))
    return extend(clip_tokenizer(), words, vocab_size=49_408 + 1000).tokenizer


def trained(model_type, captions) -> Tokenizer:
    config = SentencePieceConfig(vocab_size=2600, context_length=64, model_type=model_type)
    return train_sentencepiece(captions, config)


def without_bytes(model_type, captions) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions["zh"], *captions["en"]]), model_writer=model,
        vocab_size=2500, character_coverage=0.99, user_defined_symbols=["旗", "face"],
        model_type=model_type, minloglevel=2,
    )  # fmt: skip
    config = TokenizerConfig(
        context_length=64, begin_of_text="<s>", end_of_text="</s>", padding="</s>"
    )
    return Tokenizer(SentencePieceVocabulary(model.getvalue()), config)


def fast_tokenizer(captions) -> Tokenizer:
    """Make BERT's kind of tokenizer: every letter, and the start and the end of every word."""
    words = [w for text in captions["en"] for w in text.lower().split() if w.isalpha()]
    parts = {word[:4] for word in words} | {f"##{word[4:]}" for word in words if word[4:]}
    letters = sorted(set("".join([*words, *captions["zh"]])) - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    pieces = list(dict.fromkeys([*pieces, *sorted(parts)]))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    rust = RustTokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rust.normalizer = normalizers.BertNormalizer(lowercase=True)
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece()
    rust.add_special_tokens(pieces[:5])
    config = TokenizerConfig(
        context_length=64, begin_of_text="[CLS]", end_of_text="[SEP]", padding="[PAD]"
    )
    return Tokenizer(FastVocabulary(rust.to_str().encode()), config)


KINDS = {
    "CLIP": clip,
    "extended CLIP": extended_clip,
    "unigram": lambda captions: trained("unigram", captions),
    "BPE": lambda captions: trained("bpe", captions),
    "unigram without bytes": lambda captions: without_bytes("unigram", captions),
    "BPE without bytes": lambda captions: without_bytes("bpe", captions),
    "WordPiece": fast_tokenizer,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, train_captions):
    return KINDS[kind](train_captions)


@pytest.fixture(scope="module")
def pruned(tokenizer, texts):
    """Return the tokenizer for the texts alone, and the ids it kept."""
    return prune(tokenizer, texts)


def test_the_texts_are_split_into_the_same_pieces(tokenizer, pruned, texts):
    smaller, kept = pruned
    assert [[kept[i] for i in row] for row in smaller.split(texts)] == tokenizer.split(texts)


def test_ids_are_fewer_and_their_old_ones_ascend(tokenizer, pruned):
    smaller, kept = pruned
    assert smaller.vocab_size == len(kept) < tokenizer.vocab_size
    assert kept == sorted(set(kept))
    pieces = tokenizer.vocabulary.pieces()
    assert smaller.vocabulary.pieces() == [pieces[old] for old in kept]


def test_special_pieces_are_kept(tokenizer, pruned):
    smaller, kept = pruned
    before, after = tokenizer.special_ids, smaller.special_ids
    assert kept[after.end_of_text] == before.end_of_text
    assert kept[after.padding] == before.padding
    for old, new in [
        (before.begin_of_text, after.begin_of_text),
        (before.unknown, after.unknown),
    ]:
        assert (new is None) == (old is None)
        assert new is None or kept[new] == old
    assert smaller.config == tokenizer.config


def test_rows_of_an_embedding_by_the_kept_ids_give_the_same_vectors(tokenizer, pruned, texts):
    smaller, kept = pruned
    rows = torch.randn(tokenizer.vocab_size, 4, generator=torch.Generator().manual_seed(0))
    before, after = tokenizer.encode(texts), smaller.encode(texts)
    assert torch.equal(before.mask, after.mask)
    assert torch.equal(rows[before.ids], rows[kept][after.ids])


def test_a_piece_that_is_not_used_is_kept_only_for_a_reason(kind, tokenizer, pruned, texts):
    used = set(chain.from_iterable(tokenizer.split(texts)))
    pieces = tokenizer.vocabulary.pieces()
    reasons = special_pieces(tokenizer)
    if kind in ("unigram", "unigram without bytes"):
        reasons.add(worst_piece(tokenizer))
    merged = "|".join(pieces[token] for token in used) if "BPE" in kind or "CLIP" in kind else ""
    idle = {pieces[token] for token in set(pruned[1]) - used}
    if "CLIP" in kind:  # each byte is a piece within a word and another at its end
        idle = {piece for piece in idle if len(piece.removesuffix("</w>")) > 1}
    assert {piece for piece in idle - reasons if piece not in merged} == set()


def special_pieces(tokenizer: Tokenizer) -> set[str]:
    config = tokenizer.config
    names = {config.begin_of_text, config.end_of_text, config.padding, "<unk>", "[UNK]", "[MASK]"}
    return names | {"<s>"} | {f"<0x{byte:02X}>" for byte in range(256)}


def worst_piece(tokenizer: Tokenizer) -> str | None:
    """Return the piece that a unigram model scores lowest."""
    if isinstance(tokenizer.vocabulary, FastVocabulary):
        return None
    proto = ModelProto.FromString(tokenizer.vocabulary.files()["sentencepiece.model"])
    return min((p for p in proto.pieces if p.type == 1), key=lambda piece: piece.score).piece


@pytest.mark.parametrize("kind", ["CLIP", "extended CLIP", "unigram", "BPE"], scope="module")
def test_other_texts_can_still_be_said_where_bytes_say_everything(tokenizer, pruned):
    smaller, _ = pruned
    assert tokenizer.special_ids.unknown is None
    before, after = tokenizer.split(UNSEEN), smaller.split(UNSEEN)
    # CLIP's pieces say where a word ends, so that smaller ones may have other spaces.
    said_before = [tokenizer.decode(row).replace(" ", "") for row in before]
    assert [smaller.decode(row).replace(" ", "") for row in after] == said_before
    assert sum(map(len, after)) > sum(map(len, before))


def test_a_pruned_tokenizer_is_read_as_it_was_written(pruned, texts, tmp_path):
    smaller, _ = pruned
    smaller.save(tmp_path)
    read = load_tokenizer(tmp_path)
    assert read.fingerprint == smaller.fingerprint
    assert read.split(texts) == smaller.split(texts)


def test_pruning_twice_by_the_same_texts_changes_nothing(pruned, texts):
    smaller, kept = pruned
    again, all_of_them = prune(smaller, texts)
    assert again.fingerprint == smaller.fingerprint
    assert all_of_them == list(range(len(kept)))


@pytest.mark.parametrize("kind", ["CLIP", "unigram without bytes", "WordPiece"], scope="module")
def test_pieces_that_are_used_less_than_asked_are_left_out(tokenizer, texts):
    counts = Counter(chain.from_iterable(tokenizer.split(texts)))
    smaller, kept = prune(tokenizer, texts, fewest_uses=5)
    assert {token for token, count in counts.items() if count >= 5} <= set(kept)
    assert len(kept) < len(prune(tokenizer, texts)[1])
    pieces = tokenizer.vocabulary.pieces()
    rare = {pieces[token] for token, count in counts.items() if count < 5}
    if tokenizer.special_ids.unknown is not None:  # else merges may need some of them
        kept_pieces = set(smaller.vocabulary.pieces())
        assert rare & kept_pieces <= special_pieces(tokenizer) | {worst_piece(tokenizer)}


@pytest.mark.parametrize("fewest_uses", [0, -1])
def test_fewer_uses_than_one_are_refused(fewest_uses):
    with pytest.raises(TokenizerError, match=rf"fewest_uses is {fewest_uses}; expected at least 1"):
        prune(merges_by_hand(), ["abc"], fewest_uses=fewest_uses)


@pytest.mark.parametrize(
    ("texts", "fewest_uses"),
    [([], 1), (["", ""], 1), (["abc"], 2)],
    ids=["no text", "empty texts", "none used often enough"],
)
def test_texts_that_use_no_piece_are_refused(texts, fewest_uses):
    with pytest.raises(TokenizerError, match="the texts use no piece"):
        prune(merges_by_hand(), texts, fewest_uses=fewest_uses)


def test_texts_may_be_streamed_and_many():
    tokenizer = merges_by_hand()
    counts = count_ids(tokenizer, (text for text in ["abcx", "cx"] * 10_000))
    pieces = tokenizer.vocabulary.pieces()
    assert {pieces[i]: n for i, n in counts.items()} == {"abc": 10_000, "x": 10_000, "cx": 10_000}
    assert prune(tokenizer, iter(["abcx", "cx"]))[1] == prune(tokenizer, ["abcx", "cx"])[1]


def merges_by_hand() -> Tokenizer:
    """Make a byte-pair tokenizer whose `abc` can be merged in two ways, of which one is used."""
    merges = [("a", "b"), ("a", "bc"), ("ab", "c"), ("c", "x"), ("b", "c")]
    pieces = ["<e>", *"abcxyz", "ab", "abc", "cx", "bc"]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, merges)
    config = TokenizerConfig(context_length=8, begin_of_text=None, end_of_text="<e>", padding="<e>")
    return Tokenizer(FastVocabulary(RustTokenizer(model).to_str().encode()), config)


def test_merges_are_kept_on_the_way_that_texts_take():
    tokenizer, texts = merges_by_hand(), ["abcx", "cx"]
    smaller, kept = prune(tokenizer, texts)
    pieces = tokenizer.vocabulary.pieces()
    assert [[pieces[kept[i]] for i in row] for row in smaller.split(texts)] == [
        ["abc", "x"],
        ["cx"],
    ]
    assert "bc" not in smaller.vocabulary.pieces()


def unigram_by_hand(scores: dict[str, float]) -> Tokenizer:
    """Make a unigram tokenizer of pieces with these scores, without bytes."""
    proto = ModelProto()
    for piece, role in (("<unk>", 2), ("</s>", 3)):
        proto.pieces.add(piece=piece, type=role)
    for piece, score in scores.items():
        proto.pieces.add(piece=piece, score=score, type=1)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.add_dummy_prefix = False
    config = TokenizerConfig(
        context_length=8, begin_of_text=None, end_of_text="</s>", padding="</s>"
    )
    return Tokenizer(SentencePieceVocabulary(proto.SerializeToString()), config)


def test_a_character_that_loses_its_piece_does_not_become_more_likely():
    """What is unknown scores less than the worst piece, and x is worse than other pieces."""
    scores = {"xy": -20.0, "zw": -20.0, "yzw": -3.0, "x": -60.0, "q": -50.0}
    tokenizer, texts = unigram_by_hand(scores), ["xyzw", "yzw"]
    assert len(tokenizer.split(texts)[0]) == 2
    smaller, kept = prune(tokenizer, texts)
    assert [[kept[i] for i in row] for row in smaller.split(texts)] == tokenizer.split(texts)
    assert smaller.vocabulary.id_of("q") is None
