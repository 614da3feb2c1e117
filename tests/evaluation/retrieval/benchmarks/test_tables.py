"""Tables of images and captions: columns found by their names, one or more rows an image."""

import csv

import pyarrow
import pyarrow.parquet
import pytest

from tests.builders import THINGS, encoded, make_image
from tests.evaluation.retrieval.benchmarks.opened import opened
from vlm.errors import DataError

ZH = [zh for _, zh in THINGS]
EN = [en for en, _ in THINGS]
TABLES = ["a.csv", "a.tsv", "a.parquet"]


@pytest.fixture(autouse=True)
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(make_image(number)))


def write_table(path, columns):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    ("image", "caption"), [("image", "caption"), ("path", "text"), ("filename", "title")]
)
def test_rows_are_captions_in_order(tmp_path, name, image, caption):
    names = ["images/1.png", "images/0.png", "images/1.png"]
    texts = ["红，苹果", ' 灰色的"猫" ', "小\n狗"]
    path = write_table(tmp_path / name, {"n": ["7", "8", "9"], image: names, caption: texts})
    found = opened(path)
    assert (found.kind, found.image_names) == ("table", names[:2])
    assert found.images[0] == tmp_path / "images/1.png"
    assert found.texts["zh"].texts == texts
    assert found.texts["zh"].matches.tolist() == [[0, 0], [1, 1], [2, 0]]
    assert found.findings.get("duplicate_image_ids", 0) == 0
    assert opened(tmp_path).image_names == found.image_names  # the folder with one table


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("prefix", ["", "caption_", "text_", "title_"])
def test_languages_have_columns_of_their_own(tmp_path, name, prefix):
    names = [f"{number}.png" for number in range(3)]
    columns = {"id": names, "image": names, f"{prefix}zh": ZH[:3], f"{prefix}en": EN[:3]}
    path = write_table(tmp_path / name, columns)
    found = opened(path, images=tmp_path / "images")
    assert {code: of.texts for code, of in found.texts.items()} == {"zh": ZH[:3], "en": EN[:3]}


def test_captions_keep_the_turn_that_the_file_gives_them(tmp_path):
    columns = {
        "image": ["1.png", "0.png", "1.png", "gone.png", "1.png"],
        "zh": ["", ZH[0], ZH[1], ZH[2], ZH[3]],
        "en": [EN[4], EN[0], " ", EN[2], EN[3]],
    }
    path = write_table(tmp_path / "a.csv", columns)
    found = opened(path, images=tmp_path / "images", allowed_share=0.5)
    assert found.texts["zh"].texts == [ZH[0], ZH[1], ZH[3]]
    assert found.texts["en"].texts == [EN[4], EN[0], EN[3]]
    said = [
        (EN.index(found.texts["en"].texts[en]), ZH.index(found.texts["zh"].texts[zh]))
        for en, zh in found.translations["en", "zh"]
    ]
    assert said == [(0, 0), (3, 3)]


def test_a_cell_of_parquet_may_hold_several_captions(tmp_path):
    columns = {"image": ["0.png", "1.png"], "caption": [[ZH[0], ZH[1]], [ZH[2]]]}
    path = write_table(tmp_path / "a.parquet", columns)
    found = opened(path, images=tmp_path / "images")
    assert found.texts["zh"].matches.tolist() == [[0, 0], [1, 0], [2, 1]]


def test_commas_of_clip_benchmarks_captions_are_not_quoted(tmp_path):
    path = tmp_path / "flickr30k_test_karpathy.txt"
    path.write_text('image,caption\n0.png,a cat, grey , sleeps\n1.png,a "big", dog\n')
    found = opened(path, images=tmp_path / "images")
    assert found.texts["en"].texts == ["a cat, grey , sleeps", 'a "big", dog']


@pytest.mark.parametrize("name", TABLES)
def test_a_column_of_splits_divides_the_rows(tmp_path, name):
    columns = {
        "image": ["0.png", "1.png", "2.png"],
        "split": ["val", "test", "val"],
        "caption": EN[:3],
    }
    path = write_table(tmp_path / name, columns)
    found = opened(path, images=tmp_path / "images")
    assert (found.split, found.texts["en"].texts) == ("test", EN[1:2])
    found = opened(path, images=tmp_path / "images", split="val")
    assert found.texts["en"].texts == [EN[0], EN[2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption,more\na.png,x\n", "line 2: found 2 cells; expected 3"),
        (b"image,caption\na.png,\xbb\xd2\n", "line 2: byte 0xbb at 6 is not UTF-8"),
    ],
)
def test_a_damaged_row_is_refused(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        opened(path)


def test_a_parquet_with_images_in_it_is_a_source(tmp_path):
    columns = {"image": [{"bytes": b"x", "path": "0.png"}], "caption": ["a"]}
    path = write_table(tmp_path / "a.parquet", columns)
    found = opened(path)
    assert (found.kind, list(found.images)) == ("source", [b"x"])
    with pytest.raises(DataError, match=r"row 1: found .*; expected an image's path"):
        opened(path, kind="table")


def test_a_damaged_parquet_is_refused(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"image": ["0.png"] * 99, "caption": ZH[:1] * 99})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a.parquet cannot be read: Parquet magic bytes not"):
        opened(path)


def test_of_several_tables_one_must_be_given(tmp_path):
    for name in TABLES[:2]:
        write_table(tmp_path / name, {"image": ["images/0.png"], "caption": [EN[0]]})
    with pytest.raises(DataError, match=r"several tables: a.csv, a.tsv"):
        opened(tmp_path)


def test_a_caption_without_a_language_next_to_one_with_is_read_in_its_own(tmp_path):
    columns = {
        "image": ["0.png", "1.png"],
        "caption": EN[:2],
        "caption_zh": ZH[:2],
        "title": ZH[2:4],
    }
    found = opened(write_table(tmp_path / "a.csv", columns), images=tmp_path / "images")
    assert {code: of.texts for code, of in found.texts.items()} == {"en": EN[:2], "zh": ZH[:2]}
    assert found.translations["en", "zh"].tolist() == [[0, 0], [1, 1]]
    columns["caption_en"] = [f"{text} again" for text in EN[:2]]
    found = opened(write_table(tmp_path / "a.csv", columns), images=tmp_path / "images")
    assert found.texts["en"].texts == columns["caption_en"]
    assert found.findings["notes"] == ("'caption' is not read: it is in en, as 'caption_en' is",)


@pytest.mark.parametrize("name", TABLES)
def test_a_language_may_have_a_region(tmp_path, name):
    columns = {
        "image": ["0.png"],
        "caption_zh-CN": ZH[:1],
        "caption_en_US": EN[:1],
        "caption_chinese": EN[1:2],
    }
    found = opened(write_table(tmp_path / name, columns), images=tmp_path / "images")
    assert {code: of.texts for code, of in found.texts.items()} == {"zh": ZH[:1], "en": EN[:1]}
    assert "'caption_chinese'" in found.findings["notes"][0]


def test_a_table_whose_columns_are_not_understood_lists_them(tmp_path):
    path = write_table(tmp_path / "a.csv", {"img": ["0.png"], "caption": EN[:1]})
    with pytest.raises(
        DataError, match=r"has the columns 'img', 'caption'; expected one of images"
    ):
        opened(path)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_an_open_quote_swallows_no_row(tmp_path, name):
    texts = [
        '"red square',
        "green square",
        'blue "square"',
        "white one",
        '"black" square',
        "orange",
    ]
    delimiter = "\t" if name == "a.tsv" else ","
    lines = [f"{n % 3}.png{delimiter}{text}\n" for n, text in enumerate(texts)]
    path = tmp_path / name
    path.write_text(f"image{delimiter}caption\n" + "".join(lines))
    found = opened(path, images=tmp_path / "images")
    assert found.texts["en"].texts == texts


def test_a_language_can_be_stated_where_letters_do_not_tell(tmp_path):
    path = write_table(
        tmp_path / "a.csv", {"image": ["0.png", "1.png"], "caption": ["红 red", "🟥"]}
    )
    assert list(opened(path, images=tmp_path / "images", language="zh").texts) == ["zh"]
    columns = {"image": ["0.png"], "caption_zh": ZH[:1]}
    path = write_table(tmp_path / "a.csv", columns)
    with pytest.raises(DataError, match=r"names the languages of all its captions: zh; .*'en'"):
        opened(path, images=tmp_path / "images", language="en")
