"""Tables of images and captions: columns found by their names, one or more rows an image."""

import csv

import pyarrow
import pyarrow.parquet
import pytest

from tests.builders import THINGS, encoded, make_image
from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.opening import open_benchmark

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
    found = open_benchmark(path)
    assert (found.kind, found.image_ids) == ("table", names[:2])
    assert found.images[0] == tmp_path / "images/1.png"
    assert found.captions["zh"].texts == texts
    assert found.captions["zh"].pairs.tolist() == [[0, 0], [1, 1], [2, 0]]
    assert found.findings.duplicate_image_ids == 0
    assert open_benchmark(tmp_path).image_ids == found.image_ids  # the folder with one table


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("prefix", ["", "caption_", "text_", "title_"])
def test_languages_have_columns_of_their_own(tmp_path, name, prefix):
    names = [f"{number}.png" for number in range(3)]
    columns = {"id": names, "image": names, f"{prefix}zh": ZH[:3], f"{prefix}en": EN[:3]}
    path = write_table(tmp_path / name, columns)
    found = open_benchmark(path, images=tmp_path / "images")
    assert {code: of.texts for code, of in found.captions.items()} == {"zh": ZH[:3], "en": EN[:3]}


def test_captions_keep_the_turn_that_the_file_gives_them(tmp_path):
    columns = {
        "image": ["1.png", "0.png", "1.png", "gone.png", "1.png"],
        "zh": ["", ZH[0], ZH[1], ZH[2], ZH[3]],
        "en": [EN[4], EN[0], " ", EN[2], EN[3]],
    }
    path = write_table(tmp_path / "a.csv", columns)
    found = open_benchmark(path, images=tmp_path / "images", allowed_share=0.5)
    assert found.captions["zh"].texts == [ZH[0], ZH[1], ZH[3]]
    assert found.captions["zh"].turns.tolist() == [0, 1, 2]
    assert found.captions["en"].texts == [EN[4], EN[0], EN[3]]
    assert found.captions["en"].turns.tolist() == [0, 0, 2]


def test_a_cell_of_parquet_may_hold_several_captions(tmp_path):
    columns = {"image": ["0.png", "1.png"], "caption": [[ZH[0], ZH[1]], [ZH[2]]]}
    path = write_table(tmp_path / "a.parquet", columns)
    found = open_benchmark(path, images=tmp_path / "images")
    assert found.captions["zh"].pairs.tolist() == [[0, 0], [1, 0], [2, 1]]


def test_commas_of_clip_benchmarks_captions_are_not_quoted(tmp_path):
    path = tmp_path / "flickr30k_test_karpathy.txt"
    path.write_text('image,caption\n0.png,a cat, grey , sleeps\n1.png,a "big", dog\n')
    found = open_benchmark(path, images=tmp_path / "images")
    assert found.captions["en"].texts == ["a cat, grey , sleeps", 'a "big", dog']


@pytest.mark.parametrize("name", TABLES)
def test_a_column_of_splits_divides_the_rows(tmp_path, name):
    columns = {
        "image": ["0.png", "1.png", "2.png"],
        "split": ["val", "test", "val"],
        "caption": EN[:3],
    }
    path = write_table(tmp_path / name, columns)
    found = open_benchmark(path, images=tmp_path / "images")
    assert (found.split, found.captions["en"].texts) == ("test", EN[1:2])
    found = open_benchmark(path, images=tmp_path / "images", split="val")
    assert found.captions["en"].texts == [EN[0], EN[2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption,more\na.png,x\n", "row 1 has 2 cells; expected 3"),
        (b"image,caption\na.png,\xbb\xd2\n", "cannot be read: 'utf-8' codec"),
        (
            'image,caption,split\n0.png,"' + "x" * 200_000 + '",test\n',
            "cannot be read: field larger",
        ),
    ],
)
def test_a_damaged_row_is_refused(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        open_benchmark(path)


def test_images_inside_a_parquet_are_refused(tmp_path):
    columns = {"image": [{"bytes": b"x", "path": "0.png"}], "caption": ["a"]}
    path = write_table(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=r"row 1: found .*; expected an image's path"):
        open_benchmark(path)


def test_a_damaged_parquet_is_refused(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"image": ["0.png"] * 99, "caption": ZH[:1] * 99})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a.parquet is no benchmark of a known kind"):
        open_benchmark(path)


def test_of_several_tables_one_must_be_given(tmp_path):
    for name in TABLES[:2]:
        write_table(tmp_path / name, {"image": ["images/0.png"], "caption": [EN[0]]})
    with pytest.raises(DataError, match=r"several tables: a.csv, a.tsv"):
        open_benchmark(tmp_path)
