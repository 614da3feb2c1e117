"""One reader for each format: the same rows are the same captions, whatever file holds them."""

import csv
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest

from vlm.data.captions import SUFFIXES, read_captions
from vlm.errors import DataError
from vlm.records.tables import rows_of
from vlm.records.texts import languages_of

ROWS = [
    "一只猫，在“墙”上",
    'a "red" cat',
    '"quoted"',
    '"open',
    "a, b; c",
    "U+2028 \u2028, U+0085 \x85, a form feed \x0c and a tab\vor so",
    " spaces ",
]


def tabular(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\r\n")
        writer.writerows([["id", "zh"], *enumerate(ROWS)])


def packed(path):
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(ROWS):
            for suffix, content in (("png", b"an image"), ("txt", row.encode() + b"\r\n")):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


WRITERS = {
    ".txt": lambda path: path.write_bytes("\r\n".join(["\ufeff" + ROWS[0], *ROWS[1:]]).encode()),
    ".csv": tabular,
    ".tsv": tabular,
    ".jsonl": lambda path: path.write_text("".join(json.dumps({"zh": r}) + "\n" for r in ROWS)),
    ".parquet": lambda path: pyarrow.parquet.write_table(pyarrow.table({"zh": ROWS}), path),
    ".tar": packed,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_same_rows_are_the_same_captions_in_every_format(tmp_path, suffix):
    assert suffix in SUFFIXES
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path)
    column = "txt" if suffix == ".tar" else ""  # else the script decides, line by line
    assert list(read_captions([path], "zh", column=column)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.tsv", '1\t"red\n2\tgreen\n', [["1", '"red'], ["2", "green"]]),
        ("a.tsv", '1\t"red\n\n2\tgreen', [["1", '"red'], ["2", "green"]]),
        ("a.tsv", '1\t"red', [["1", '"red']]),
        ("a.tsv", '"black" one\t5"\n"2"\t"a ""b"""\n', [['"black" one', '5"'], ["2", 'a "b"']]),
        ("a.tsv", '1\t"two\nlines"\n2\t"a\tb"\n', [["1", "two\nlines"], ["2", "a\tb"]]),
        ("a.tsv", '1\t"two\n\nlines"\n', [["1", "two\n\nlines"]]),
        ("a.csv", '1,"two\n2,lines"\n', [["1", "two\n2,lines"]]),
        ("a.csv", '1,5" wide\n2,"a ""b"""\n', [["1", '5" wide'], ["2", 'a "b"']]),
    ],
)
def test_a_quotation_mark_quotes_a_whole_cell_or_nothing(tmp_path, name, content, rows):
    delimiter = "\t" if name == "a.tsv" else ","
    (tmp_path / name).write_text(f"id{delimiter}text\n{content}")
    assert [list(row.values()) for _, row in rows_of(tmp_path / name)] == rows


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ('0.jpg,"red\n1.jpg,5" wide\n', ['"red', '5" wide']),
        ('0.jpg,"red" car, parked\n1.jpg,"a, b"\n', ['"red" car, parked', "a, b"]),
        ('0.jpg,"two\nlines, of text"\n1.jpg,b\n', ["two\nlines, of text", "b"]),
    ],
)
def test_a_table_of_an_image_and_its_caption_may_quote_nothing(tmp_path, content, captions):
    (tmp_path / "a.csv").write_text("image,caption\n" + content)
    assert [row["caption"] for _, row in rows_of(tmp_path / "a.csv")] == captions
    assert list(read_captions([tmp_path / "a.csv"], "en")) == captions


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('id\ttext\n1\t"a\nb\n2\tc\n', "line 2: unexpected end of data"),
        ('id\ttext\n1\t"a\nb" c\n', r"line 2: '\\t' expected after"),
        ("id\ttext\n1\ta\tb\n", "line 2: found 3 cells; expected 2"),
        ('id,text,n\n1,"a,2\n3,b,4\n', "line 2: unexpected end of data"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_its_first_line(tmp_path, content, said):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=said):
        list(rows_of(tmp_path / "a.csv"))


def test_a_region_is_dropped_unless_the_language_stands_without_it():
    assert languages_of(["zh-CN", "en_US"]) == {"zh-CN": "zh", "en_US": "en"}
    assert languages_of(["zh", "zh-Hant"]) == {"zh": "zh", "zh-Hant": "zh-Hant"}
    assert languages_of(["zh-Hans", "zh_tw"]) == {"zh-Hans": "zh", "zh_tw": "zh"}
    assert languages_of(["caption", "zh_old", "id"])["zh_old"] == "zh_old"


def test_captions_with_a_region_are_found(tmp_path):
    (tmp_path / "a.csv").write_text("caption_zh-CN,caption_en_US,caption\n猫,a cat,?\n")
    (tmp_path / "b.jsonl").write_text(
        '{"captions": {"zh-CN": "狗", "zh-TW": "犬", "en": "a dog"}}\n'
    )
    assert list(read_captions([tmp_path], "zh")) == ["猫", "狗", "犬"]
    assert list(read_captions([tmp_path], "en")) == ["a cat", "a dog"]


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image,caption,caption\n1.jpg,a cat,a dog\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv has the column 'caption' twice"):
        list(rows_of(path))
