"""Words are masked whole, as often as asked, whatever pieces a vocabulary makes of them."""

import random
import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import cn_clip.clip
import pytest
import rjieba
import torch

from tests.builders import unique_captions
from tests.support.commands import ROOT
from vlm.errors import ConfigError, TokenizerError
from vlm.text.cleaning import CLEANING
from vlm.text.importing import import_tokenizer
from vlm.text.masking import pieces_by_word, word_mask
from vlm.text.tokenizer import Tokenizer

SOURCES = {
    "SentencePiece with lone spaces": ROOT / "tokenizers/emoji-zh-en",
    "SentencePiece": ROOT / "tokenizers/sp-zh-en",
    "SentencePiece as tokenizer.json": ROOT / "tokenizers/sp-zh-en/tokenizer.json",
    "CLIP": "clip",
    "CLIP with Chinese pieces": ROOT / "tokenizers/clip-zh",
    "WordPiece": Path(cn_clip.clip.__file__).parent / "vocab.txt",
}
SENTENCES = [
    "一只戴着红色帽子的小猫坐在窗台上，看着外面飘落的雪花。",
    "两名足球运动员正在草地上争抢皮球",
    "夏季新款韩版宽松短袖t恤女学生百搭显瘦上衣",
    "a small kitten wearing a reddish hat sits on the windowsill, watching the snowflakes fall.",
    "two footballers in turquoise jerseys don't stop fighting for the ball",
    "一个卡通风格的 unicorn 图标, tiny and colourful",
]


@cache
def tokenizer_of(source: str) -> Tokenizer:
    return import_tokenizer(str(source), context_length=200)


@pytest.fixture(params=SOURCES.values(), ids=SOURCES)
def tokenizer(request):
    return tokenizer_of(request.param)


@pytest.fixture(scope="module")
def texts(emoji):
    captions = unique_captions(emoji("val"), ["zh", "en"])
    return [*SENTENCES, *captions[::5]]


def rngs(count: int, seed: int = 0) -> list[random.Random]:
    return [random.Random(f"{seed}/{number}") for number in range(count)]


def drawn(tokenizer: Tokenizer, texts: list[str], share: float = 0.5, seed: int = 0):
    tokens = tokenizer.encode(texts)
    return word_mask(tokenizer, texts, tokens, share, rngs(len(texts), seed)), tokens


def without_spaces(text: str) -> str:
    return "".join(text.split())


def tokens_by_word(tokenizer: Tokenizer, text: str, ids: list[int]) -> list[set[int]] | None:
    """Find the tokens of each word from what the tokens decode to, one more at a time."""
    text = CLEANING[tokenizer.config.cleaning](text)
    letters = without_spaces(text)
    said = [without_spaces(tokenizer.decode(ids[: n + 1])) for n in range(len(ids))]
    if said[-1] != letters:
        return None  # an unknown piece, or characters that the vocabulary writes in another way
    whole = [len(prefix.rstrip("\ufffd")) for prefix in said]
    tokens_at = [set() for _ in letters]
    for token, (start, end) in enumerate(zip([0, *whole], whole, strict=False)):
        for place in range(start, end if end > start else start + 1):
            if said[token] != (said[token - 1] if token else ""):  # not a lone space
                tokens_at[place].add(token)
    words, place = [], 0
    for run in re.findall(r"[一-鿿]+|[a-z0-9]+(?:'[a-z0-9]+)*|[^\s]", text.lower()):
        for word in rjieba.cut(run) if re.match("[一-鿿]", run) else [run]:
            words.append(set().union(*tokens_at[place : place + len(word)]))
            place += len(word)
    assert place == len(letters)
    return words


def test_no_word_is_masked_in_part(tokenizer, texts):
    checked = in_pieces = 0
    mask, tokens = drawn(tokenizer, texts)
    begin = int(tokenizer.special_ids.begin_of_text is not None)
    for text, row, ids, length in zip(
        texts, mask.tolist(), tokens.ids.tolist(), tokens.mask.sum(1).tolist(), strict=True
    ):
        for word in tokens_by_word(tokenizer, text, ids[begin : length - 1]) or []:
            assert len({row[begin + token] for token in word}) == 1
            checked += 1
            in_pieces += len(word) > 1
    assert checked > 200
    assert in_pieces > 40


def test_the_share_is_right_on_average(tokenizer):
    texts = SENTENCES * 100
    for share in (0.15, 0.5, 0.8):
        mask, tokens = drawn(tokenizer, texts, share)
        content = tokens.mask.sum() - len(texts) * (
            1 + (tokenizer.special_ids.begin_of_text is not None)
        )
        assert (mask.sum() / content).item() == pytest.approx(share, abs=0.01)


def test_every_word_is_drawn_as_often_as_the_others():
    tokenizer = tokenizer_of("clip")
    mask, _ = drawn(tokenizer, ["red apple and green tea with milk"] * 4000, 0.3)
    often = mask.float().mean(0)
    torch.testing.assert_close(often[1:-1], torch.full((7,), 0.3), atol=0.03, rtol=0)


def test_all_is_masked_where_all_is_asked_for(tokenizer):
    mask, tokens = drawn(tokenizer, SENTENCES, 1.0)
    special = {tokenizer.special_ids.begin_of_text, tokenizer.special_ids.end_of_text}
    for row, ids, seen in zip(mask, tokens.ids, tokens.mask, strict=True):
        assert {*ids[seen & ~row].tolist()} == special - {None}


def test_begin_end_and_padding_are_never_masked_and_something_else_always_is(tokenizer):
    texts = ["a", "猫", "unbelievably", *SENTENCES] * 20
    tokens = tokenizer.encode(texts, pad_to=150)
    mask = word_mask(tokenizer, texts, tokens, 0.05, rngs(len(texts), 1))
    last = tokens.mask.sum(1) - 1
    assert not mask[torch.arange(len(texts)), last].any()
    assert not (mask & ~tokens.mask).any()
    if tokenizer.special_ids.begin_of_text is not None:
        assert not mask[:, 0].any()
    assert mask.any(1).all()


def test_an_empty_text_loses_nothing(tokenizer):
    mask, _ = drawn(tokenizer, ["", "cat", "   "], 0.9)
    assert mask.any(1).tolist() == [False, True, False]
    empty = drawn(tokenizer, [])[0]
    assert empty.shape == (0, 0)


def test_chinese_is_masked_by_the_word_also_where_its_pieces_are_bytes():
    mask, tokens = drawn(tokenizer_of("clip"), ["苹果蛋糕"] * 200)
    assert tokens.ids.shape[1] > 2 + 6
    # Its two words, whose bytes are six each but for those that CLIP has merged.
    patterns = {tuple(row) for row in mask[:, 1:-1].tolist()}
    assert len(patterns) == 2
    first, second = patterns
    assert [not masked for masked in first] == [*second]
    assert sum(a != b for a, b in pairwise(first)) == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_that_was_cut_loses_words_of_what_is_left(side):
    long = import_tokenizer("clip", truncation=side)
    short = import_tokenizer("clip", truncation=side, context_length=8)
    text = "windowsills don't snowflake kittens turquoise jerseys"
    whole = long.encode([text])
    groups = pieces_by_word(text, long.vocabulary.spans([text])[0])
    content = whole.ids.shape[1] - 2
    kept = range(content - 6, content) if side == "left" else range(6)
    left = [{kept.index(p) for p in group if p in kept} for group in groups]
    left = [group for group in left if group]
    assert {len(group) for group in left} >= {1, 2}
    seen = set()
    for seed in range(60):
        mask, tokens = drawn(short, [text], 0.4, seed)
        assert tokens.ids.shape[1] == 8
        row = {*mask[0, 1:-1].nonzero().flatten().tolist()}
        assert row == set().union(*(group for group in left if group & row))
        seen |= row
    assert seen == {*range(6)}


def test_the_same_state_gives_the_same_masks(tokenizer, texts):
    first, again, other = (drawn(tokenizer, texts, seed=seed)[0] for seed in (3, 3, 4))
    assert first.equal(again)
    assert not first.equal(other)


def test_the_masks_of_a_text_are_alike_in_every_batch(tokenizer, texts):
    whole, _ = drawn(tokenizer, texts)
    own = rngs(len(texts))[7:9]
    part = word_mask(tokenizer, texts[7:9], tokenizer.encode(texts[7:9]), 0.5, own)
    assert part.equal(whole[7:9, : part.shape[1]])


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("红色的苹果", ["红", "色", "的", "苹", "果"], [[0, 1], [2], [3, 4]]),
        ("红色的苹果", ["红", "色的", "苹果"], [[0, 1], [2]]),  # a piece of two words joins them
        ("a red, hat", ["a", " re", "d", ",", " ", "hat"], [[0], [1, 2], [3], [4, 5]]),
        ("don't stop", ["don", "'", "t", " stop"], [[0, 1, 2], [3]]),
        ("t恤!?", ["t", "恤", "!", "?"], [[0], [1], [2], [3]]),
        ("well ", ["we", "ll", " "], [[0, 1], [2]]),
    ],
)  # fmt: skip
def test_pieces_are_grouped_by_the_words_they_are_parts_of(text, pieces, expected):
    spans, start = [], 0
    for piece in pieces:
        spans.append((start, start + len(piece)))
        start += len(piece)
    assert pieces_by_word(text, spans) == expected


def test_pieces_of_one_character_are_one_word():
    assert pieces_by_word("🦄!", [(0, 1), (0, 1), (0, 1), (1, 2)]) == [[0, 1, 2], [3]]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="ratio of masked tokens"):
        drawn(tokenizer_of("clip"), ["cat"], share)


def test_tokens_of_other_texts_are_refused():
    tokenizer = tokenizer_of("clip")
    tokens = tokenizer.encode(["a small cat"])
    with pytest.raises(TokenizerError, match="not those of the texts"):
        word_mask(tokenizer, ["cat"], tokens, 0.5, rngs(1))
    with pytest.raises(TokenizerError, match="not those of the texts"):
        word_mask(tokenizer, [], tokens, 0.5, [])
    shorter = Tokenizer(tokenizer.vocabulary, replace(tokenizer.config, context_length=4))
    with pytest.raises(TokenizerError, match="not those of the texts"):
        word_mask(shorter, ["a small cat"], tokens, 0.5, rngs(1))
