"""Captions begin with the name, and gain keywords without gaining noise."""

import builtins
import json

import pytest

from tools.emoji import captions
from tools.emoji.captions import captions_of, read_keywords
from vlm.errors import DataError


def entries(en, zh=("夹趾凉鞋",), traditional=("夾腳拖",)):
    texts = {"en": en, "zh": zh, "zh-Hant": traditional}
    return {language: {"label": label, "tags": tags} for language, (label, *tags) in texts.items()}


def test_keywords_come_after_the_name_and_the_own_ones_and_none_comes_twice():
    found = captions_of(
        entries((" thong sandal", "beach", "sandal ")),
        ["thong_sandal", "Sandal", "flip\u00a0flops", "beach", "NASA"],
    )
    assert found["en"] == ("thong sandal", "beach", "sandal", "flip flops", "NASA")


def test_emoticons_halves_of_quotations_and_vulgar_words_are_left_out():
    noise = [":D", "¯\\", "“service", "charge”", "", "Shit", "🚓 cop"]
    found = captions_of(entries(("clock",)), [*noise, "3:00", "o’clock", "jack-o'-lantern"])
    assert found["en"] == ("clock", "3:00", "o’clock", "jack-o'-lantern")


def test_chinese_gains_the_simplified_forms_of_traditional_captions():
    found = captions_of(
        entries(("taxi",), ("出租车", "的士"), ("計程車", "小黃，車，德士", "的士")), []
    )
    assert found["zh"] == ("出租车", "的士", "小黄", "车", "德士")  # 計程車 is a 出租车
    assert found["zh-Hant"] == ("計程車", "小黃，車，德士", "的士")


def test_keywords_are_read_by_emoji_without_variation_selectors():
    table = {"\u2764\ufe0f": ["love"], "😀": ["smile"]}
    files = {"dist/emoji-en-US.json": json.dumps(table).encode()}
    assert read_keywords(files) == {"\u2764": ["love"], "😀": ["smile"]}


def test_a_missing_converter_is_one_clear_error(monkeypatch):
    real = builtins.__import__

    def without_opencc(name, *args, **kwargs):
        if name == "opencc":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    captions._simplifier.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without_opencc)
    with pytest.raises(DataError, match="needs OpenCC; run `pip install"):
        captions_of(entries(("clock",)), [])
