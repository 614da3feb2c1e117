"""XM3600 and XTD10: the captions of every language, with their images."""

import json

import pytest

from tests.builders import THINGS, encoded, make_image
from tests.evaluation.retrieval.benchmarks.opened import opened
from vlm.errors import DataError

ZH = [zh for _, zh in THINGS]
EN = [en for en, _ in THINGS]


@pytest.fixture
def xm3600(tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for number in range(3):
        key = f"{number:016x}"
        (tmp_path / "images" / f"{key}.jpg").write_bytes(encoded(make_image(number), "JPEG"))
        records.append(
            {
                "image/key": key,
                "image/locale": "quz",
                "en": {"caption": [EN[number], EN[number + 3]], "caption/tokenized": ["x", "y"]},
                "zh": {"caption": [ZH[number]], "caption/tokenized": ["x"]},
                "de": {"caption": [f"Bild {number}"]},
            }
        )
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (tmp_path / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def xtd10(tmp_path):
    names = [f"COCO_val2014_{number:012d}.jpg" for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(make_image(number), "JPEG"))
    (tmp_path / "test_image_names.txt").write_text("\n".join(names))
    for code, texts in (("en", EN), ("zh", ZH), ("jp", ["猫がいる", "犬がいる", "木"])):
        text = "".join(f"{text}\n" for text in texts[:3])
        (tmp_path / f"test_1kcaptions_{code}.txt").write_text(text, encoding="utf-8")
    return tmp_path


def test_xm3600_has_its_languages(xm3600):
    found = opened(xm3600)
    assert found.kind == "xm3600"
    assert [path.name for path in found.images] == [f"{number:016x}.jpg" for number in range(3)]
    assert set(found.texts) == {"en", "zh", "de"}
    assert found.texts["zh"].texts == ZH[:3]
    assert found.texts["zh"].matches.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert found.texts["en"].texts == [EN[0], EN[3], EN[1], EN[4], EN[2], EN[5]]
    assert found.texts["en"].matches.tolist() == [[n, n // 2] for n in range(6)]
    assert found.findings["captions_listed"] == 12
    assert not found.translations


def test_one_language_can_be_asked_for(xm3600):
    found = opened(xm3600 / "captions.jsonl", languages=["zh"])
    assert set(found.texts) == {"zh"}
    with pytest.raises(DataError, match="has captions in en, zh, de; expected ko as well"):
        opened(xm3600, languages=["ko"])


def test_a_line_of_xm3600_without_its_key_is_named(xm3600):
    with (xm3600 / "captions.jsonl").open("a") as file:
        file.write('{"en": {"caption": ["a"]}}')
    with pytest.raises(DataError, match='line 4 has no "image/key"; found en'):
        opened(xm3600)


def test_xtd10_has_one_caption_an_image_and_language(xtd10):
    found = opened(xtd10)
    assert found.kind == "xtd10"
    assert {code: of.texts for code, of in found.texts.items()} == {
        "en": EN[:3], "zh": ZH[:3], "ja": ["猫がいる", "犬がいる", "木"],
    }  # fmt: skip
    for captions in found.texts.values():
        assert captions.matches.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert set(found.translations) == {("en", "ja"), ("en", "zh")}
    for translations in found.translations.values():
        assert translations.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_a_language_of_xtd10_with_another_number_of_captions_is_refused(xtd10):
    with (xtd10 / "test_1kcaptions_zh.txt").open("a") as file:
        file.write("一张\n")
    with pytest.raises(DataError, match=r"_zh.txt has 4 captions; expected 3"):
        opened(xtd10)
