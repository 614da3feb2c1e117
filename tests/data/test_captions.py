"""Captions stream out of every kind of source, and what is wrong in one is said with its place."""

import csv
import gzip
import io
import json
import os
import re
import tarfile
import threading
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tqdm import tqdm

from tests.builders import (
    THINGS,
    encoded,
    make_image,
    make_sample,
    make_samples,
    open_split,
    unique_captions,
    write_img2dataset,
    write_split,
)
from tests.support.web_server import WebServer
from vlm.data.captions import read_captions
from vlm.data.indexing import index_folder
from vlm.data.manifest import read_manifest
from vlm.errors import DataError

EMOJI = Path(__file__).parents[2] / "data" / "emoji"
ZH = [zh for _, zh in THINGS]
EN = [en for en, _ in THINGS]
PNG = encoded(make_image(0))
OWN = {"captions": {"zh": ["猫", "猫咪"], "en": ["a cat"]}}


def read(*sources, language="zh", **options):
    return list(read_captions(sources, language, **options))


def refusal_of(*sources, language="zh", **options):
    with pytest.raises(DataError) as caught:
        read(*sources, language=language, **options)
    return str(caught.value)


def write(path, content):
    """Write text or bytes, packed if the name says so; return the path."""
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix.lower() == ".gz" else content)
    return path


def write_table(path, columns):
    """Write columns (name: cells) as a table of the kind that the name says."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return path
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if ".tsv" in path.name else ",")
    writer.writerows([list(columns), *zip(*columns.values(), strict=True)])
    return write(path, text.getvalue())


def write_records(path, *records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def write_tar(path, members):
    """Write (name, content) as a tar with Python's own writer; records may be objects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            data = text.encode() if isinstance(text, str) else text
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return write(path, buffer.getvalue())


@contextmanager
def traced_memory():
    """Give a function that returns the most bytes that Python held at a time."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


TABLES = ["a.csv", "a.tsv.gz", "a.parquet"]
TARS = ["a.tar", "a.tar.gz"]


# Text files


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT", "A.TXT.GZ"])
def test_each_line_of_a_text_file_is_a_caption(tmp_path, name):
    assert read(write(tmp_path / name, "\n".join(ZH))) == ZH


@pytest.mark.parametrize(
    "text", ["猫\n\n \t\n狗\n\n", "猫\r\n\r\n狗\r\n", "\ufeff猫\n狗", "猫\n\ufeff狗\n"],
    ids=["blank lines", "line ends of Windows", "a byte order mark", "that of a file appended"],
)  # fmt: skip
def test_what_surrounds_the_lines_is_no_caption(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text)) == ["猫", "狗"]


def test_captions_are_given_as_they_are_written_and_as_often(tmp_path):
    lines = [" Grey  Cat ", "Ｃａｔ", "a\u2028b", "a\x0bb", "猫", "猫"]
    assert read(write(tmp_path / "a.txt", "\n".join(lines))) == lines


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize(("bad", "byte"), [("灰猫".encode("gbk"), "bb"), (b"ok \xff", "ff")])
def test_a_line_that_is_not_utf_8_is_named_with_its_byte(tmp_path, name, bad, byte):
    path = write(tmp_path / name, b"one\n" * 5000 + bad + b"\ntwo\n")
    message = refusal_of(path)
    assert message.startswith(f"{path}, line 5001: byte 0x{byte} at ")
    assert "expected text in UTF-8" in message


@pytest.mark.parametrize("name", ["a.txt.gz", "a.csv.gz", "a.jsonl.gz"])
def test_a_packed_file_cut_anywhere_is_refused(tmp_path, name):
    write_records(tmp_path / "b.gz", *({"text": f"caption {number}"} for number in range(50)))
    content = (tmp_path / "b.gz").read_bytes()
    path = tmp_path / name
    for length in range(1, len(content), 17):
        path.write_bytes(content[:length])
        assert str(path) in refusal_of(path, column='{"text": "caption 0"}' * (".csv" in name))


def test_a_packed_file_with_a_changed_byte_is_refused(tmp_path):
    path = write(tmp_path / "a.txt.gz", "\n".join(f"caption {number}" for number in range(50)))
    content = path.read_bytes()
    for position in range(10, len(content), 3):  # after the header, whose flags and date may vary
        changed = bytearray(content)
        changed[position] ^= 0xFF
        path.write_bytes(changed)
        assert str(path) in refusal_of(path)


def test_damage_is_placed_after_the_last_line_that_could_be_read(tmp_path):
    lines = [os.urandom(20).hex() for _ in range(20_000)]
    path = write(tmp_path / "a.txt.gz", "\n".join(lines))
    path.write_bytes(path.read_bytes()[:-200])
    captions = read_captions([path], "en")
    assert [next(captions) for _ in range(9000)] == lines[:9000]
    with pytest.raises(DataError, match=rf"{path} cannot be read after line \d{{5}}: Compress"):
        list(captions)


def test_a_file_that_only_claims_to_be_packed_is_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_text("a cat")
    assert refusal_of(path).startswith(f"{path} cannot be read: Not a gzipped file")


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.records.texts.LONGEST", 1000)
    assert read(write(tmp_path / "a.txt", "a" * 999 + "\nb")) == ["a" * 999, "b"]
    path = write(tmp_path / "b.txt", "a\n")
    os.truncate(path, 10_000_000)
    with traced_memory() as memory:
        assert refusal_of(path) == f"{path}, line 2 is longer than 1000 bytes"
        assert memory() < 2_000_000


# Tables


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("column", ["zh", "caption_zh", "text_zh-CN", "caption"])
def test_the_captions_of_a_table_are_found_by_the_columns_name(tmp_path, name, column):
    path = write_table(tmp_path / name, {"id": EN, column: ZH, "caption_en": EN})
    assert read(path) == ZH


@pytest.mark.parametrize("name", [*TABLES, "a.jsonl"])
def test_fields_that_name_the_language_serve_or_else_the_first_that_names_none(tmp_path, name):
    columns = {"text": ["四"], "caption": ["三"], "caption_zh": ["二"], "zh": ["一"], "en": ["0"]}
    for last, expected in [("", "二一"), ("zh", "二"), ("caption_zh", "三"), ("caption", "四")]:
        columns.pop(last, None)
        row = {column: cells[0] for column, cells in columns.items()}
        path = tmp_path / name
        written = write_records(path, row) if name == "a.jsonl" else write_table(path, columns)
        assert read(written) == list(expected)


@pytest.mark.parametrize("name", TABLES)
def test_a_column_that_is_asked_for_goes_before_all(tmp_path, name):
    path = write_table(tmp_path / name, {"zh": EN, "TEXT": ZH})
    assert read(path, column="TEXT") == ZH


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_the_column_says_which_it_has(tmp_path, name):
    path = write_table(tmp_path / name, {"url": EN, "name": ZH})
    message = f"{path} has no column 'title'; its columns are 'url', 'name'"
    assert refusal_of(path, column="title") == message
    assert refusal_of(path).startswith(
        f"{path} has the columns 'url', 'name'; expected one of images, such as image or path or "
        "filename, unless captions alone are read, and one of captions, such as caption or text"
    )


def test_a_table_without_a_header_is_refused_in_few_words(tmp_path):
    path = write_table(tmp_path / "a.csv", {f"column {n}" * 100: ["x"] for n in range(50)})
    assert len(refusal_of(path)) < len(str(path)) + 1000
    assert "has the columns none; expected" in refusal_of(write(tmp_path / "b.csv", ""))


@pytest.mark.parametrize("name", TABLES)
def test_empty_cells_are_skipped(tmp_path, name):
    path = write_table(tmp_path / name, {"zh": ["猫", None, "", "  ", "狗"], "id": list("abcde")})
    assert read(path) == ["猫", "狗"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_cells_may_hold_line_ends_quotes_and_delimiters(tmp_path, name):
    cells = ['a "red", round\tapple', "two\nlines", "two\r\nlines", "猫\n\n狗"]
    assert read(write_table(tmp_path / name, {"id": list("abcd"), "zh": cells})) == cells


def test_cells_may_be_longer_than_the_csv_module_allows_by_itself(tmp_path):
    path = write_table(tmp_path / "a.csv", {"image": ["x" * 200_000], "zh": ["猫"]})
    assert read(path) == ["猫"]


def test_a_table_may_begin_with_a_byte_order_mark_and_hold_blank_lines(tmp_path):
    assert read(write(tmp_path / "a.csv", "\ufeffzh,id\r\n猫,1\r\n\r\n狗,2\r\n")) == ["猫", "狗"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("1,a cat\n2,a cat, a dog\n3,x\n", "line 3: found 3 cells; expected 2 as in the header"),
        ("1,a cat\n2\n3,x\n", "line 3: found 1 cells; expected 2 as in the header"),
        ('1,"a cat\n2,a dog\n', "line 2: unexpected end of data; expected a table with quotes"),
        ('1,"a" cat\n', "line 2: ',' expected after '\"'; expected a table with quotes"),
    ],
    ids=["a comma without quotes", "a cell too few", "an open quote", "a quote inside"],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, rows, said):
    path = write(tmp_path / "a.csv", "id,caption\n" + rows)
    assert refusal_of(path).startswith(f"{path}, {said}")


def test_a_cell_that_is_not_utf_8_is_named_by_its_line(tmp_path):
    path = write(tmp_path / "a.csv", b"id,caption\n1,a\n2,\xc3\xa8\xc3\n")
    assert refusal_of(path).startswith(f"{path}, line 3: byte 0xc3 at 4 is not UTF-8")


@pytest.mark.parametrize("column", ["caption", "a.caption"])
def test_every_text_of_a_column_of_lists_is_a_caption(tmp_path, column):
    cells = [["a", "b"], None, [], ["c", None, " "], ["d"]]
    path = write_table(tmp_path / "a.parquet", {column: cells, "n": [[n] for n in range(5)]})
    assert read(path, column=column) == ["a", "b", "c", "d"]


def test_a_column_of_captions_by_language_is_read_in_the_language(tmp_path):
    cells = [{"zh": ["猫", "猫咪"], "en": ["a cat"]}, {"zh": [], "en": ["a dog"]}]
    path = write_table(tmp_path / "a.parquet", {"captions": cells})
    assert read(path) == read(path, column="captions.zh") == ["猫", "猫咪"]
    assert read(path, language="en") == ["a cat", "a dog"]


def test_columns_of_any_arrow_text_are_read(tmp_path):
    text = pyarrow.array(ZH)
    for number, kind in enumerate([pyarrow.large_string(), pyarrow.string_view()]):
        assert read(write_table(tmp_path / f"{number}.parquet", {"zh": text.cast(kind)})) == ZH
    assert read(write_table(tmp_path / "d.parquet", {"zh": text.dictionary_encode()})) == ZH


@pytest.mark.parametrize("cell", [7, b"a cat", [3], {"en": 1, "zh": 2}], ids=str)
def test_a_column_that_holds_no_text_is_refused(tmp_path, cell):
    path = write_table(tmp_path / "a.parquet", {"caption": [None, cell]})
    assert refusal_of(path).startswith(f"{path}, row 2: found ")


def test_a_parquet_text_that_is_not_utf_8_is_named_by_its_row(tmp_path):
    cells = pyarrow.array([b"a", b"b", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    path = write_table(tmp_path / "a.parquet", {"caption": cells})
    message = f"{path} cannot be read after row 2: 'utf-8' codec can't decode byte 0xff"
    assert refusal_of(path).startswith(message)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_parquet_file_that_is_cut_off_is_refused(tmp_path, share):
    path = write_table(tmp_path / "a.parquet", {"caption": ZH})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert refusal_of(path).startswith(f"{path} cannot be read: ")


def test_a_parquet_file_is_read_group_by_group_and_its_checksums_are_checked(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"caption {number}" for number in range(6144)]
    pyarrow.parquet.write_table(
        pyarrow.table({"caption": texts}), path, row_group_size=2048, compression="none",
        use_dictionary=False, write_page_checksum=True,
    )  # fmt: skip
    content = path.read_bytes()
    path.write_bytes(content.replace(b"caption 5000", b"caption 5001", 1))
    captions = read_captions([path], "en")
    assert [next(captions) for _ in range(4096)] == texts[:4096]
    with pytest.raises(DataError, match=rf"{path} cannot be read after row 4096: .*checksum"):
        next(captions)


# Records


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    "record",
    [
        OWN, {"zh": ["猫", "猫咪"]}, {"caption_zh": ["猫", None, "", "猫咪"], "caption": "a cat"},
        OWN | {"caption": "a cat", "zh": "狗"}, OWN["captions"],
    ],
    ids=["our schema", "a list", "blank ones", "our schema and more", "languages as keys"],
)  # fmt: skip
def test_records_hold_one_caption_or_several(tmp_path, name, record):
    path = write_records(tmp_path / name, record, {"zh": "狗"}, {"zh": None})
    assert read(path) == ["猫", "猫咪", "狗"]


def test_blank_lines_between_records_and_a_byte_order_mark_do_no_harm(tmp_path):
    assert read(write(tmp_path / "a.jsonl", '\ufeff{"zh": "猫"}\n\n{"zh": "狗"}')) == ["猫", "狗"]


def test_a_key_that_is_asked_for_goes_before_our_schema_which_serves_without_it(tmp_path):
    path = write_records(tmp_path / "a.jsonl", OWN | {"TEXT": "狗"}, OWN)
    assert read(path, column="TEXT") == ["狗", "猫", "猫咪"]
    assert read(path, column="captions.zh") == ["猫", "猫咪"] * 2


def test_records_without_captions_are_skipped_where_others_have_them(tmp_path):
    path = write_records(tmp_path / "a.jsonl", {"en": "a cat"}, {"zh": "猫"}, {}, {"id": 3})
    assert read(path) == ["猫"]


def test_records_none_of_which_has_captions_are_refused_with_their_keys(tmp_path):
    path = write_records(tmp_path / "a.jsonl", {"id": 1, "name": "猫"}, {"name": "a dog"})
    said = f"no sample of {path} has a caption: {path}, line 1: found no caption in 'id', 'name'"
    assert refusal_of(path) == f"{said}; expected at least one"
    assert refusal_of(path, column="title") == f"{said}; expected some in 'title'"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON: "),
        ('{"zh": "猫"', "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        ('["猫"]', "is a JSON list; expected an object"),
        ('"猫"', "is a JSON str; expected an object"),
        ('{"zh": 3}', ": found 3; expected a text or a list of texts"),
        ('{"zh": ["a", ["b"]]}', ": found ['b']; expected a text or a list of texts"),
        ('{"captions": {"zh": true}}', ": found True; expected a text or a list of texts"),
        ('{"zh": "a \\ud83d"}', ": '\\ud83d' is half a character"),
    ],
    ids=[
        "a brace", "cut off", "deep", "a list", "a text", "a number", "lists in a list",
        "a truth value", "half a surrogate pair",
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_of_captions_is_named(tmp_path, line, said):
    path = write(tmp_path / "a.jsonl", f'{{"zh": "狗"}}\n\n{line}\n')
    message = refusal_of(path)
    assert message.startswith(f"{path}, line 3{said if said[0] == ':' else ' ' + said}")


# Shards


@pytest.mark.parametrize("name", TARS)
def test_the_records_of_a_shard_are_read_in_our_schema_and_by_keys(tmp_path, name):
    members = [
        ("a.png", PNG), ("a.json", OWN), ("README", "猪"), ("x/b.json", {"caption": "狗"}),
        ("x/b.jpg", PNG), ("c.json", {"captions": {"en": ["a horse"]}}), ("d.png", PNG),
    ]  # fmt: skip
    assert read(write_tar(tmp_path / name, members)) == ["猫", "猫咪", "狗"]


@pytest.mark.parametrize("name", TARS)
def test_texts_of_a_shard_serve_where_no_record_names_captions(tmp_path, name):
    members = [
        ("a.txt", "不"), ("a.json", OWN),  # img2dataset writes both
        ("b.txt", "狗\n"), ("b.json", {"url": "x"}),
        ("c.jpg", PNG), ("c.TXT", "\ufeff马\r\n"),
        ("d.json", {"captions": {"en": ["a pig"]}}), ("d.txt", "a pig"),
        ("e.json", {"caption": None}), ("e.txt", ""),
    ]  # fmt: skip
    assert read(write_tar(tmp_path / name, members)) == ["猫", "猫咪", "狗", "马"]


def test_links_folders_and_hidden_files_in_a_shard_are_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in [("a", tarfile.DIRTYPE), ("b.txt", tarfile.SYMTYPE)]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
        for name, content in [("a/._c.txt", b"\xff\xfe"), ("a/c.txt", "猫".encode())]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert read(path) == ["猫"]
    assert sorted(tmp_path.iterdir()) == [path]  # nothing was extracted


def test_names_that_need_headers_of_their_own_are_read(tmp_path):
    name = "长" * 80 + "/" + "名" * 60
    for number, kind in enumerate([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=kind) as archive:
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = 3
            archive.addfile(member, io.BytesIO("猫".encode()))
        assert read(path) == ["猫"]


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (("x/b.json", b"{"), "sample 'x/b', its .json is not JSON: "),
        (("x/b.json", b"[]"), "sample 'x/b', its .json is a JSON list; expected an object"),
        (("x/b.json", b"\xff{}"), "sample 'x/b', its .json: byte 0xff at 0 is not UTF-8"),
        (("x/b.json", {"captions": {"zh": 5}}), "sample 'x/b': found 5; expected a text"),
        (("x/b.txt", b"a\xe7\x8c"), "sample 'x/b', its .txt: byte 0xe7 at 1 is not UTF-8"),
    ],
    ids=["no JSON", "a list", "JSON not UTF-8", "a number", "text not UTF-8"],
)
@pytest.mark.parametrize("name", TARS)
def test_a_member_that_holds_no_captions_is_named(tmp_path, name, member, said):
    path = write_tar(tmp_path / name, [("a.json", OWN), member, ("x/c.json", OWN)])
    assert refusal_of(path).startswith(f"{path}, {said}")


def test_a_member_too_large_for_a_caption_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data.scanning.LONGEST", 1000)
    path = write_tar(tmp_path / "a.tar", [("a.png", b"p" * 3000), ("a.txt", "c" * 1001)])
    assert refusal_of(path) == f"{path}, sample 'a', its .txt is longer than 1000 bytes"


def test_a_shard_whose_samples_have_no_captions_is_refused_with_what_they_have(tmp_path):
    members = [("a.png", PNG), ("a.json", {"id": 1}), ("b.zh.txt", "猫")]
    path = write_tar(tmp_path / "a.tar", members)
    assert refusal_of(path) == (
        f"no sample of {path} has a caption: {path}, sample 'a': found no caption in 'id'; "
        "expected at least one"
    )


@pytest.mark.parametrize("name", TARS)
def test_a_shard_cut_anywhere_is_refused(tmp_path, name):
    members = [(f"{number}.{kind}", OWN) for number in range(3) for kind in ("json", "png")]
    path = write_tar(tmp_path / name, members)
    content = path.read_bytes()
    end = len(content.rstrip(b"\0")) if path.suffix == ".tar" else len(content)
    for length in {*range(0, end, 256), *range(0, end, 37), end - 1}:
        path.write_bytes(content[:length])
        assert refusal_of(path).startswith(f"{path} cannot be read")


def test_a_shard_without_its_end_is_refused_though_each_member_is_whole(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.json", OWN)])
    path.write_bytes(path.read_bytes()[:1024])
    assert refusal_of(path).startswith(f"{path} cannot be read after sample 'a': ")
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    assert refusal_of(path).startswith(f"{path} cannot be read after sample 'a': ")
    path.write_bytes(path.read_bytes() + b"\0" * 512)
    assert read(path) == ["猫", "猫咪"]


@pytest.mark.parametrize("name", TARS)
@pytest.mark.parametrize("place", [3, 150], ids=["a name", "a checksum"])
def test_a_shard_with_a_damaged_header_does_not_just_end_there(tmp_path, name, place):
    path = write_tar(tmp_path / name, [(f"{number}.json", OWN) for number in range(3)])
    content = bytearray(
        path.read_bytes() if name == "a.tar" else gzip.decompress(path.read_bytes())
    )
    content[2048 + place] ^= 1
    write(path, bytes(content))
    assert re.match(rf"{path} cannot be read after sample '.': .*damaged", refusal_of(path))


def test_a_shard_with_a_header_of_zeros_does_not_just_end_there(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{number}.json", OWN) for number in range(3)])
    content = path.read_bytes()
    path.write_bytes(content[:1024] + bytes(512) + content[1536:])
    assert "it does not end as a tar file does" in refusal_of(path)


@pytest.mark.parametrize(
    "content", [b"", b"a text, no tar", b"\xff" * 2000, gzip.compress(b"x", mtime=0)]
)
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    assert refusal_of(tmp_path / "a.tar").startswith(f"{tmp_path / 'a.tar'} cannot be read: ")


# Folders


@pytest.mark.parametrize("split", ["val", pytest.param("test_style", marks=pytest.mark.slow)])
def test_a_data_folder_gives_what_its_split_holds(split):
    samples = list(open_split(EMOJI, split))  # read once for both languages
    for language in ("zh", "en"):
        captions = read(EMOJI, language=language, split=split)
        assert captions == [text for sample in samples for text in sample.captions[language]]
        assert list(dict.fromkeys(captions)) == unique_captions(samples, [language])


def test_a_data_folder_gives_its_training_split_unless_told_otherwise(tmp_path):
    write_split(tmp_path, make_samples(7), samples_per_shard=3)
    write_split(tmp_path, [make_sample(0, captions={"zh": ["考试"]})], split="test")
    expected = [text for sample in make_samples(7) for text in sample.captions["zh"]]
    assert read(tmp_path) == expected
    assert read(tmp_path, column="TEXT") == expected  # a column is of tables and others' records
    assert read(tmp_path, split="test") == ["考试"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "is missing; the manifest lists it"),
        (lambda path: path.write_bytes(b""), r"is damaged: 0 bytes, the manifest says \d+"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
            "is damaged: sha256 [0-9a-f]{12}, the manifest says [0-9a-f]{12}",
        ),
    ],
    ids=["missing", "empty", "a changed byte"],
)
def test_a_shard_of_a_data_folder_is_verified(tmp_path, damage, said):
    write_split(tmp_path, make_samples(2))
    path = tmp_path / read_manifest(tmp_path).splits["train"][0].name
    damage(path)
    assert re.match(f"shard {path} {said}", refusal_of(tmp_path))


def test_a_data_folder_without_the_split_names_its_splits(tmp_path):
    write_split(tmp_path, make_samples(1))
    assert "has no split 'gone'; its splits are train" in refusal_of(tmp_path, split="gone")
    (tmp_path / "manifest.json").write_text("{}")
    assert "manifest.json is not a manifest" in refusal_of(tmp_path)


def test_a_folder_without_samples_gives_all_its_texts_and_tables_sorted(tmp_path):
    write(tmp_path / "b.txt", "2")
    write_table(tmp_path / "c.csv", {"zh": ["4"]})
    write_records(tmp_path / "b" / "z.jsonl", {"zh": "1"})
    write_tar(tmp_path / "b" / "a" / "train" / "0.tar", [("a.txt", "0")])
    write_table(tmp_path / "b.txt.parquet", {"zh": ["3"]})
    write(tmp_path / "notes.md", "not a caption")
    write(tmp_path / "._b.txt", b"\xff")  # what macOS leaves beside files
    write(tmp_path / ".cache" / "b.txt", "not a caption")
    (tmp_path / "b" / "again").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    assert read(tmp_path) == ["0", "1", "2", "3", "4"]


def test_pages_may_have_images_without_captions(tmp_path):
    write(tmp_path / "猫.html", "<p>猫<p>狗")
    write(tmp_path / "猫_files" / "1.png", PNG)
    assert read(tmp_path) == ["猫", "狗"]


def test_a_folder_is_read_as_training_reads_it_split_by_split(tmp_path):
    tars = write_img2dataset(tmp_path / "tars", ZH, samples_per_shard=5)
    write_tar(tars / "test-0.tar", [("a.txt", "考试")])
    write_table(tars / "00000.parquet", {"caption": ["img2dataset writes it again"]})
    assert read(tars) == read(f"{tars}/0*.tar") == ZH
    assert read(tars, split="test") == ["考试"]
    assert "has no split 'val'; its splits are test, train" in refusal_of(tars, split="val")


def test_images_give_the_captions_of_the_files_of_their_names(tmp_path):
    write(tmp_path / "a.png", PNG)
    write(tmp_path / "a.json", json.dumps(OWN))
    write(tmp_path / "b" / "c.png", PNG)
    write(tmp_path / "b" / "c.txt", "狗\n马\n")
    write(tmp_path / "notes.txt", "not a caption")
    assert read(tmp_path) == ["猫", "猫咪", "狗", "马"]


@pytest.mark.parametrize("name", [*TABLES, "a.jsonl"])
def test_rows_of_another_split_are_left_out(tmp_path, name):
    columns = {"zh": ["猫", "狗", "马"], "split": ["train", "test", ""]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path = tmp_path / name
    written = write_records(path, *rows) if name == "a.jsonl" else write_table(path, columns)
    assert read(written) == ["猫", "马"]
    assert read(written, split="test") == ["狗", "马"]


@pytest.mark.parametrize("names", [(), ("a.md", "x/b.zip", "c")])
def test_a_folder_with_nothing_to_read_says_what_is_read(tmp_path, names):
    for name in names:
        write(tmp_path / name, "text")
    message = refusal_of(tmp_path)
    assert message.startswith(f"{tmp_path} is nothing with captions; expected a folder of images")
    assert ".txt.gz" in message
    assert ".jsonl" in message


# Languages that nothing names


@pytest.mark.parametrize("name", [*TABLES, "a.jsonl", "a.tar"])
def test_a_caption_whose_language_nothing_names_is_in_that_of_its_script(tmp_path, name, caplog):
    captions = [
        *(caption for pair in zip(ZH, EN, strict=True) for caption in pair),
        "3",
        "猫がいる",
    ]
    path = write_unnamed(tmp_path / name, captions)
    assert read(path) == [*ZH, "3", "猫がいる"]
    assert read(path, language="en") == [*EN, "3", "猫がいる"]
    assert [record.message for record in caplog.records] == [
        f"left out {len(THINGS)} captions whose script says another language than {language}; "
        "`--column FIELD` takes all that are in a field"
        for language in ("zh", "en")
    ]


@pytest.mark.parametrize("name", [*TABLES, "a.jsonl", "a.tar"])
def test_captions_that_are_mostly_in_a_language_are_all_in_it(tmp_path, name, caplog):
    captions = ["OK", *ZH, "3D", *ZH, "iPhone 12"]
    path = write_unnamed(tmp_path / name, captions)
    assert read(path) == captions
    assert not caplog.records
    assert read(path, language="en") == ["OK", "3D", "iPhone 12"]


@pytest.mark.parametrize("name", [*TABLES, "a.jsonl", "a.tar"])
def test_all_captions_of_a_field_that_is_asked_for_are_in_the_language(tmp_path, name, caplog):
    captions = [*EN, *ZH, "OK"]
    assert read(write_unnamed(tmp_path / name, captions), column="caption") == captions
    assert not caplog.records


def test_a_caption_without_a_language_next_to_one_with_it_is_that_one_again(tmp_path):
    rows = [{"caption": zh, "caption_zh": f"一只{zh}", "caption_en": en} for en, zh in THINGS]
    path = write_records(tmp_path / "a.jsonl", *rows, {"caption": "猪", "caption_zh": ""})
    assert read(path) == [*(f"一只{zh}" for zh in ZH), "猪"]
    assert read(path, language="en") == EN


def write_unnamed(path, captions):
    """Write captions into fields whose names do not give a language."""
    if path.suffix == ".jsonl":
        return write_records(path, *({"caption": caption} for caption in captions))
    if path.suffix == ".tar":
        return write_tar(path, [(f"{n}.json", {"caption": of}) for n, of in enumerate(captions)])
    return write_table(path, {"id": list(map(str, range(len(captions)))), "caption": captions})


# Several sources, and none


def test_sources_follow_each_other_in_the_order_given(tmp_path):
    first, second = write(tmp_path / "b.txt", "1\n2"), write(tmp_path / "a.txt.gz", "3")
    assert read(first, second, first) == ["1", "2", "3", "1", "2"]


@pytest.mark.parametrize("name", ["a.md", "a", "a.gz", "a.parquet.gz", "txt"])
def test_a_file_of_no_known_kind_is_refused_before_any_is_read(tmp_path, name):
    good, bad = write(tmp_path / "good.txt", "x"), write(tmp_path / name, "x")
    with pytest.raises(
        DataError, match=f"{bad} is nothing with captions; .*txt.gz, .*tar.gz, .parquet"
    ):
        read_captions([good, bad], "zh")


def test_a_missing_source_is_refused_before_any_is_read(tmp_path):
    good = write(tmp_path / "good.txt", "x")
    with pytest.raises(DataError, match=r"gone.txt: nothing is there"):
        read_captions([good, tmp_path / "gone.txt"], "zh")
    with pytest.raises(DataError, match=r"gone is missing; expected"):
        read_captions([good, tmp_path / "gone"], "zh")
    with pytest.raises(DataError, match="no source of captions in 'zh'; expected files"):
        read_captions([], "zh")


def test_a_file_that_vanished_meanwhile_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    captions = read_captions([path], "zh")
    path.unlink()
    with pytest.raises(DataError, match=f"{path} cannot be read: .*No such file"):
        next(captions)
    write_split(tmp_path / "own", make_samples(1))
    captions = read_captions([tmp_path / "own"], "zh")
    shard = tmp_path / "own" / "train-00000.tar.gz"
    shard.unlink()
    with pytest.raises(DataError, match=f"shard {shard} is missing; the manifest lists it"):
        next(captions)


def test_sources_without_a_caption_in_the_language_are_named_with_what_they_hold(tmp_path):
    text, records = write(tmp_path / "a.txt", "\n \n"), write_records(tmp_path / "a.jsonl", OWN)
    more = write_records(tmp_path / "b.jsonl", {"caption": "a cat"})
    found = "found 2 in zh, 1 in en, 1 in en by script"
    message = f"{text}, {records}, {more} hold no caption in 'fr'; {found}"
    assert refusal_of(text, records, more, language="fr") == message
    assert read(text, records, language="en") == ["a cat"]
    assert refusal_of(text).endswith("hold no caption in 'zh'; found none")


def test_files_that_hold_nothing_do_no_harm_beside_others(tmp_path):
    paths = [
        write(tmp_path / "a.txt", ""),
        write(tmp_path / "b.jsonl", ""),
        write_table(tmp_path / "c.csv", {"zh": []}),
        write_table(tmp_path / "d.parquet", {"zh": pyarrow.array([], pyarrow.string())}),
        write(tmp_path / "f.txt", "猫"),
    ]
    assert read(tmp_path) == read(*paths, write_tar(tmp_path / "e.tar", [])) == ["猫"]


# Places


def test_captions_of_tars_tables_and_texts_come_from_a_place(tmp_path, cache):
    index_folder(write_img2dataset(tmp_path / "web" / "pairs", EN, samples_per_shard=3))
    write_table(tmp_path / "web" / "a.csv", {"zh": ["猫", "狗"]})
    write(tmp_path / "web" / "a.txt.gz", "马\n牛\n")
    write_records(tmp_path / "web" / "bad.jsonl", {"zh": 3})
    with WebServer(tmp_path / "web") as web:
        assert read(web.url("pairs"), language="en") == EN
        assert read(web.url("pairs/{00000..00001}.tar"), language="en") == EN[:6]
        assert read(web.url("a.csv"), web.url("a.txt.gz")) == ["猫", "狗", "马", "牛"]
        assert refusal_of(web.url("bad.jsonl")).startswith(f"{web.url('bad.jsonl')}, line 1: found")
        assert refusal_of(web.url("gone.txt")) == f"{web.url('gone.txt')} is not there"


# Streaming


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_a_caption_is_there_before_the_file_is_read_to_its_end(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    arrived, seen = threading.Event(), []
    # The first 100 captions of records are read at once.
    rows = [f"first {number}" for number in range(1 if name == "a.txt" else 100)]

    def feed():
        first, more = {
            "a.txt": ("first 0\n", "more\n"),
            "a.csv": ("".join(f"{row}\n" for row in ["zh", *rows]), "more\n"),
            "a.jsonl": (
                "".join(f'{{"zh": "{row}"}}\n' for row in rows), '{"zh": "more"}\n',
            ),
        }[name]  # fmt: skip
        with path.open("w", buffering=1) as file:
            file.write(first)
            seen.append(arrived.wait(timeout=20))
            file.write(more)

    writer = threading.Thread(target=feed)
    writer.start()
    captions = read_captions([path], "zh")
    assert [next(captions) for _ in rows] == rows
    arrived.set()
    assert list(captions) == ["more"]
    writer.join()
    assert seen == [True]


def test_no_caption_of_a_shard_is_given_before_its_end_is_seen(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", str(n) * 900_000) for n in range(4)])
    path.write_bytes(path.read_bytes()[:3_200_000])
    with pytest.raises(DataError, match=f"{path} cannot be read after sample '3'"):
        next(read_captions([path], "zh"))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.csv", "a.jsonl", "a.tar"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    texts = [f"caption {number} " + "x" * 30_000 for number in range(400)]
    path = tmp_path / name
    if name == "a.tar":
        write_tar(path, [(f"{number}.txt", text) for number, text in enumerate(texts)])
    elif name == "a.jsonl":
        write_records(path, *({"text": text} for text in texts))
    else:
        write(path, "\n".join(["caption", *texts]))
    with traced_memory() as memory:
        assert sum(1 for _ in read_captions([path], "en")) >= 400
        assert memory() < 5_000_000 < sum(map(len, texts))


def test_memory_grows_neither_with_the_groups_of_a_parquet_file_nor_with_one(tmp_path):
    path = tmp_path / "a.parquet"
    schema = pyarrow.schema([("en", pyarrow.string()), ("image", pyarrow.binary())])
    with pyarrow.parquet.ParquetWriter(path, schema) as file:
        for _ in range(2):
            rows = {"en": [os.urandom(1000).hex() for _ in range(6000)], "image": [b"x"] * 6000}
            file.write_table(pyarrow.table(rows, schema=schema))
    before, peak = pyarrow.total_allocated_bytes(), 0
    for _ in read_captions([path], "en"):
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert peak < 8_000_000 < path.stat().st_size
    assert pyarrow.total_allocated_bytes() == before


def test_leaving_early_closes_the_file(tmp_path):
    paths = [
        write(tmp_path / "a.txt", "1\n2"),
        write_tar(tmp_path / "a.tar", [(f"{n}.txt", str(n)) for n in range(1, 200)]),
        write_table(tmp_path / "a.parquet", {"zh": list(map(str, range(1, 2000)))}),
    ]
    for path in paths:
        before = len(os.listdir("/proc/self/fd"))
        captions = read_captions([path], "zh", progress=True)
        assert next(captions) == "1"
        assert len(os.listdir("/proc/self/fd")) > before
        captions.close()
        assert len(os.listdir("/proc/self/fd")) == before


# Progress


def test_one_bar_counts_the_bytes_of_all_files_on_stderr(tmp_path, capsys):
    write(tmp_path / "a.txt", "\n".join(os.urandom(100).hex() for _ in range(300)))
    write(tmp_path / "a.txt.gz", "\n".join(os.urandom(100).hex() for _ in range(300)))
    write_tar(tmp_path / "a.tar", [("a.png", os.urandom(30_000)), ("a.txt", "a cat")])
    write_table(tmp_path / "a.parquet", {"en": ["a cat"], "image": [os.urandom(30_000)]})
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    read(*sorted(tmp_path.iterdir()), language="en", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    last = err.rstrip().rsplit("\r", 1)[-1]
    assert last.startswith("captions in en: 100%")
    done, total = re.search(r"([\d.]+)k/([\d.]+)k ", last).groups()
    assert done == total
    assert float(total) == pytest.approx(size / 1024, rel=0.01)


def test_a_packed_file_moves_the_bar_by_what_is_read_of_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.gz", "\n".join(os.urandom(100).hex() for _ in range(20_000)))
    moves = []
    monkeypatch.setattr("vlm.data.captions.tqdm.update", lambda bar, n: moves.append(n))
    read(path, language="en", progress=True)
    *steps, _ = moves  # the last is what was left
    assert len(steps) > 5
    assert sum(steps) == path.stat().st_size


def test_the_rows_of_a_parquet_file_move_the_bar_to_its_size(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", {"zh": ["猫"] * 3000, "image": [b"x"] * 3000})
    size, at = path.stat().st_size, []
    update = tqdm.update
    monkeypatch.setattr(tqdm, "update", lambda bar, n: (update(bar, n), at.append(bar.n)))
    read(path, progress=True)
    assert at == pytest.approx([size * 1024 / 3000, size * 2048 / 3000, size, size], abs=4)
    assert at[-1] == size


def test_without_progress_nothing_is_printed(tmp_path, capsys):
    read(write(tmp_path / "a.txt", "a cat"))
    assert capsys.readouterr() == ("", "")
