"""Whatever people have is one kind of source or another, and says what is wrong with it."""

import gzip
import json
import os
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from tests.builders import (
    THINGS,
    encoded,
    make_image,
    make_samples,
    write_img2dataset,
    write_split,
    write_tar,
)
from vlm.batches.config import MixedSourceConfig
from vlm.data.config import SourceConfig
from vlm.data.source import open_source
from vlm.errors import ConfigError, DataError

ZH = [zh for _, zh in THINGS]
EN = [en for en, _ in THINGS]
IMAGES = [encoded(make_image(number)) for number in range(4)]


def source_of(path, **settings):
    return open_source(SourceConfig(path=str(path), **settings))


def captions_of(source):
    return [dict(sample.captions) for sample in source]


def refusal_of(path, **settings):
    with pytest.raises(DataError) as caught:
        source_of(path, **settings)
    return str(caught.value)


def write_images(folder, **texts):
    """Write images 0.png, 1.png, ..., and files of given names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(IMAGES):
        (folder / f"{number}.png").write_bytes(image)
    for name, text in texts.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


# Tars


@pytest.fixture
def tars(tmp_path):
    return write_img2dataset(tmp_path / "tars", [*ZH[:4], *EN[4:7]], samples_per_shard=3)


@pytest.mark.parametrize("name", ["", "/{00000..00002}.tar", "/*.tar", "/0000[0-2].tar"])
def test_img2datasets_tars_need_no_settings(tars, name):
    source = source_of(f"{tars}{name}")
    assert source.sizes == [3, 3, 1]
    assert captions_of(source) == [{"zh": [zh]} for zh in ZH[:4]] + [{"en": [en]} for en in EN[4:7]]
    assert [sample.image for sample in source] == [
        encoded(make_image(number), "JPEG") for number in range(7)
    ]
    sample = source[4]
    assert sample.uid == sample.concept == "00001/000010001"
    assert sample.address == source.address(1, 1) == f"{tars}/00001.tar#1"


def test_a_sample_by_shard_and_row_is_that_of_the_sequence(tars):
    source = source_of(tars)
    found = [source.at(s, row) for s, size in enumerate(source.sizes) for row in range(size)]
    assert found == list(source) == [source[index] for index in range(len(source))]


def test_tars_of_one_pattern_keep_the_order_of_its_numbers(tars):
    for old, new in (("00000", "9"), ("00001", "10"), ("00002", "11")):
        (tars / f"{old}.tar").rename(tars / f"{new}.tar")
    shutil.copytree(tars, tars.parent / "more")
    source = source_of(f"{tars.parent}/{{tars,more}}/*.tar")
    assert [sample.uid for sample in source][::3][:3] == [
        "more/9/000000000", "more/10/000010000", "more/11/000020000",
    ]  # fmt: skip
    assert len({sample.uid for sample in source}) == len(source) == 14


def test_tars_may_be_packed_and_have_no_records(tmp_path):
    members = [("a.jpg", IMAGES[0]), ("a.txt", "一只猫\n猫咪\n".encode()), ("b.webp", IMAGES[1])]
    path = write_tar(tmp_path / "0.tar", [*members, ("b.txt", b"a dog")])
    (tmp_path / "1.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    source = source_of(tmp_path)
    assert captions_of(source) == [{"zh": ["一只猫", "猫咪"]}, {"en": ["a dog"]}] * 2
    assert [sample.image for sample in source] == IMAGES[:2] * 2


def test_tars_have_the_split_of_their_names(tmp_path):
    shutil.copytree(write_split(tmp_path / "a", make_samples(2)), tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "manifest.json").unlink()
    assert [sample.captions for sample in source_of(tmp_path)] == [
        sample.captions for sample in make_samples(2)
    ]
    said = refusal_of(tmp_path, split="val")
    assert said == f"{tmp_path} has no split 'val'; its splits are train"
    assert "has no splits" in refusal_of(tmp_path / "train-00000.tar.gz", split="val")


def test_hidden_files_are_no_tars(tars):
    (tars / "._00000.tar").write_bytes(b"\0\5\x16\7")
    assert len(source_of(tars)) == len(source_of(f"{tars}/*.tar")) == 7


def test_samples_of_a_tar_that_cannot_be_used_are_counted_and_say_why(tmp_path):
    record = {"captions": {"en": ["cat \ud83d"]}}
    members = [
        ("good.png", IMAGES[0]), ("good.txt", b"a cat"), ("alone.txt", b"a cat"),
        ("mute.png", IMAGES[1]), ("mute.txt", b" \n"), ("list.png", IMAGES[1]),
        ("list.json", b"[]"), ("half.png", IMAGES[1]), ("half.json", json.dumps(record).encode()),
        ("gbk.png", IMAGES[1]), ("gbk.txt", "灰猫".encode("gbk")),
    ]  # fmt: skip
    path = write_tar(tmp_path / "0.tar", members)
    source = source_of(path)
    assert (len(source), source[0].captions) == (6, {"en": ["a cat"]})
    said = [reason for _, reason in source.damaged()]
    assert all(sentence.startswith(f"{path}, sample '") for sentence in said)
    for sentence, part in zip(
        said,
        ["needs one image and", "no caption in 'txt'", "a JSON list", "half a character", "UTF-8"],
        strict=True,
    ):
        assert part in sentence


def test_a_tar_whose_number_of_samples_img2dataset_says_otherwise_is_refused(tars):
    (tars / "00001_stats.json").write_text('{"successes": 5}')
    assert refusal_of(tars).startswith(f"{tars}/00001.tar holds 3 samples, img2dataset counted 5")


@pytest.mark.parametrize("size", [0, 600, 2000, 9000])
def test_a_tar_that_is_cut_off_is_refused_by_its_name(tars, size):
    os.truncate(tars / "00001.tar", size)
    assert f"{tars}/00001.tar cannot be read" in refusal_of(tars)


def test_a_tar_that_changes_after_the_source_was_opened_is_refused(tars):
    source = source_of(tars)
    os.utime(tars / "00001.tar", ns=(1, 1))
    assert source[0].captions == {"zh": [ZH[0]]}
    with pytest.raises(DataError, match=r"00001\.tar has changed since the source was opened"):
        source[3]


# Tables


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.csv.gz", "a.parquet"])
def test_tables_of_paths_need_no_settings(tmp_path, name):
    write_images(tmp_path / "images")
    rows = [
        {"n": str(n), "image": f"images/{n % 3}.png", "caption_zh": ZH[n], "caption": EN[n]}
        for n in range(4)
    ]
    source = source_of(write_table(tmp_path / name, rows))
    assert captions_of(source) == [{"zh": [ZH[n]], "en": [EN[n]]} for n in range(4)]
    assert [sample.image for sample in source] == [*IMAGES[:3], IMAGES[0]]
    assert [sample.uid for sample in source] == [f"{name}#{n}" for n in range(4)]
    # Two rows of one image are never negatives of each other.
    assert [sample.concept for sample in source][2:] == ["images/2.png", "images/0.png"]
    assert source[3].address == str(tmp_path / "images/0.png")


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_a_packed_table_is_found_in_its_folder(tmp_path, name):
    write_images(tmp_path)
    write_table(tmp_path / name, [{"image": "1.png", "zh": ZH[1]}])
    assert captions_of(source_of(tmp_path)) == [{"zh": [ZH[1]]}]


def write_table(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if ".jsonl" in path.name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        sign = "\t" if ".tsv" in path.name else ","
        text = "\n".join(sign.join(row) for row in [rows[0], *(row.values() for row in rows)])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_a_table_of_one_language_and_a_folder_of_images_elsewhere(tmp_path):
    folder = write_images(tmp_path / "images")
    path = write_table(tmp_path / "a.csv", [{"image": "1.png", "zh": ZH[1]}])
    said = refusal_of(path)
    assert said.startswith(f"{path}: of its first 1 images none is there, such as {tmp_path}/1.png")
    source = source_of(path, images=folder)
    assert (captions_of(source), source[0].image) == ([{"zh": [ZH[1]]}], IMAGES[1])


@pytest.mark.parametrize("struct", [True, False], ids=["datasets", "bytes"])
def test_parquet_may_hold_its_images(tmp_path, struct):
    images = [{"bytes": image, "path": f"{n}.png"} if struct else image
              for n, image in enumerate(IMAGES)]  # fmt: skip
    rows = [{"image": image, "text": [ZH[n], EN[n]]} for n, image in enumerate(images)]
    for part in range(2):
        name = f"data/train-{part:05d}-of-00002.parquet"
        (tmp_path / "data").mkdir(exist_ok=True)
        write_table(tmp_path / name, rows[part::2])
    source = source_of(tmp_path / "data")
    assert [sample.image for sample in source] == [*IMAGES[::2], *IMAGES[1::2]]
    assert source[1].captions == {"zh": [ZH[2]], "en": [EN[2]]}
    assert source[1].uid == source[1].concept == "train-00000-of-00002.parquet#1"
    assert source[1].address == f"{tmp_path}/data/train-00000-of-00002.parquet#1"
    assert "its splits are train" in refusal_of(tmp_path / "data", split="val")


def test_a_column_of_splits_divides_a_table(tmp_path):
    write_images(tmp_path)
    rows = [{"image": f"{n}.png", "split": ["train", "val"][n % 2], "zh": ZH[n]} for n in range(4)]
    path = write_table(tmp_path / "a.csv", rows)
    assert captions_of(source_of(path)) == [{"zh": [ZH[0]]}, {"zh": [ZH[2]]}]
    val = source_of(path, split="val")
    assert [sample.uid for sample in val] == ["a.csv#1", "a.csv#3"]
    assert "has no split 'test'; its splits are train, val" in refusal_of(path, split="test")


def test_a_long_table_is_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data.index.ROWS", 3)
    monkeypatch.setattr("vlm.data.source.ROWS", 3)
    write_images(tmp_path)
    rows = [{"image": f"{n % 4}.png", "en": f"caption {n}"} for n in range(7)]
    source = source_of(write_table(tmp_path / "a.csv", rows))
    assert source.sizes == [3, 3, 1]
    assert captions_of(source) == [{"en": [f"caption {n}"]} for n in range(7)]
    assert source.at(2, 0) == source[6]
    with pytest.raises(IndexError):
        source.at(2, 1)


def test_rows_that_cannot_be_used_are_counted_and_say_why(tmp_path):
    write_images(tmp_path)
    rows = [
        {"image": "0.png", "zh": ZH[0]}, {"image": "", "zh": ZH[1]}, {"image": "2.png", "zh": ""},
        {"image": "gone.png", "zh": ZH[3]}, {"image": "a\0b.png", "zh": ZH[3]},
    ]  # fmt: skip
    path = write_table(tmp_path / "a.jsonl", rows)
    source = source_of(path)
    said = [reason for _, reason in source.damaged()]
    assert len(source) == 5
    assert said[0] == f"{path}, line 2: found ''; expected an image or its path"
    assert said[1].startswith(f"{path}, line 3: found no caption in 'image', 'zh'")
    assert said[2] == f"{tmp_path}/gone.png cannot be read: No such file or directory"
    assert "embedded null byte" in said[3]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"url": "0.png", "caption": "a"}, "has the columns 'url', 'caption'; expected one"),
        (
            {"image": "0.png", "name": "a"},
            "has the columns 'image', 'name'; expected one",
        ),
    ],
)
def test_a_table_that_is_not_understood_says_which_columns_it_has(tmp_path, row, said):
    write_images(tmp_path)
    assert said in refusal_of(write_table(tmp_path / "a.csv", [row]))


# Folders of images


def test_images_have_the_captions_of_the_files_of_their_names(tmp_path):
    folder = write_images(
        tmp_path / "f", **{"0__txt": f"{ZH[0]}\n{EN[0]}", "1__json": json.dumps({"zh": ZH[1]})}
    )
    write_images(folder / "deep", **{"3__txt": EN[3]})
    (folder / ".hidden.png").write_bytes(IMAGES[0])
    source = source_of(folder)
    assert len(source) == 8
    assert (source[0].uid, source[0].captions) == ("0.png", {"zh": [ZH[0]], "en": [EN[0]]})
    assert source[1].captions == {"zh": [ZH[1]]}
    assert source[0].address == str(folder / "0.png")
    said = [reason for _, reason in source.damaged()]
    assert len(said) == 8 - 3
    assert said[0] == f"{folder}/2.png has no caption: found no .txt or .json of its name"


def test_the_name_of_an_image_may_be_no_utf_8(tmp_path):
    name = "红色".encode("gbk")
    folder = os.fsencode(tmp_path)
    for suffix, content in ((b".png", IMAGES[2]), (b".txt", b"a red square")):
        with open(folder + b"/" + name + suffix, "wb") as file:
            file.write(content)
    (sample,) = source_of(tmp_path)
    assert sample.uid == f"{name.decode('utf-8', 'backslashreplace')}.png"
    assert (sample.image, sample.captions) == (IMAGES[2], {"en": ["a red square"]})


def test_images_without_any_caption_are_refused(tmp_path):
    said = refusal_of(write_images(tmp_path / "f"))
    assert said.endswith("images without captions, such as 0.png; expected 0.txt or 0.json")


# Settings


def test_captions_are_read_from_the_fields_that_are_named(tmp_path):
    record = {"meta": {"zh": ZH[0], "more": [ZH[1]]}, "caption": EN[0], "kind": 7, "note": EN[1]}
    members = [("a.png", IMAGES[0]), ("a.json", json.dumps(record).encode()), ("a.txt", b"x")]
    path = write_tar(tmp_path / "0.tar", members)
    source = source_of(
        path,
        captions={"zh": ("json.meta.zh", "json.meta.more", "json.gone"), "en": ("txt",)},
        language_of=("json.note", "json.meta.more"),
        concept="json.kind",
    )
    assert source[0].captions == {"zh": [ZH[0], ZH[1], ZH[1]], "en": ["x", EN[1]]}
    assert source[0].concept == "7"
    said = refusal_of(path, captions={"en": ("json.title",)})
    assert "found no caption in 'meta', 'caption', 'kind', 'note'; expected some in 'json" in said


def test_a_table_with_a_concept_of_another_name_has_its_captions_by_their_names(tmp_path):
    write_images(tmp_path)
    rows = [{"image": "0.png", "caption_zh": ZH[0], "en": EN[0], "product": "p7"}]
    (sample,) = source_of(write_table(tmp_path / "a.csv", rows), concept="product")
    assert (sample.captions, sample.concept) == ({"zh": [ZH[0]], "en": [EN[0]]}, "p7")


def test_a_caption_in_neither_language_is_kept_under_no_known_one(tmp_path):
    write_images(tmp_path)
    rows = [{"image": "0.png", "caption": [ZH[0], "猫がいる"]}]
    source = source_of(write_table(tmp_path / "a.jsonl", rows))
    assert source[0].captions == {"zh": [ZH[0]], "und": ["猫がいる"]}


def test_conditions_choose_samples_of_any_kind(tars):
    assert captions_of(source_of(tars, where=("languages=en",))) == [{"en": [en]} for en in EN[4:7]]
    source = source_of(tars, where=("languages!=en", "concept!=00000/000000001"))
    assert source.sizes == [2, 1]  # no shard is empty
    assert [sample.uid[-4:] for sample in source] == ["0000", "0002", "0000"]
    assert source.address(1, 0) == f"{tars}/00001.tar#0"
    assert "has no sample where languages=fr" in refusal_of(tars, where=("languages=fr",))


def test_fields_that_are_no_list_and_weights_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"captions\.zh is 'txt'; expected a list of fields"):
        SourceConfig(path="x", captions={"zh": "txt"})
    with pytest.raises(ConfigError, match="weight is 0; expected more than 0"):
        MixedSourceConfig(path="x", weight=0)


@pytest.mark.parametrize("setting", [{"image": "x"}, {"images": "x"}])
def test_what_only_tables_have_is_refused_for_others(tars, setting):
    with pytest.raises(ConfigError, match=r"is no table \(tars\); found image"):
        source_of(tars, **setting)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gone", "is missing; expected a data folder, tars, tables or images"),
        ("pipe:touch canary", "commands are not run"),
        ("*.tar", "nothing is there"),
        ("{0..2}.tar", "1.tar: nothing is there"),
        ("{0..2", "unbalanced braces"),
        ("a.docx", "a.docx is no known kind of file; expected files of one of .tar"),
        ("{0.tar,a.docx}", "is no known kind of file"),
        ("", "holds no samples; expected a manifest.json, tars, tables"),
    ],
)
def test_a_path_without_a_source_says_what_was_expected(tmp_path, name, said):
    if name:
        (tmp_path / "a.docx").touch()
    if "0" in name:
        write_tar(tmp_path / "0.tar", [])
    path = name if ":" in name else f"{tmp_path}/{name}"
    assert said in refusal_of(path)


def test_an_address_in_a_column_of_images_is_no_path(tmp_path):
    (tmp_path / "a.csv").write_text(
        "image,caption\nhttps://host/1.jpg,a cat\n1.png,a dog\n", encoding="utf-8"
    )
    (tmp_path / "1.png").write_bytes(encoded(make_image(1)))
    source = open_source(SourceConfig(path=str(tmp_path / "a.csv")))
    with pytest.raises(DataError, match=r"line 2: https://host/1\.jpg is a URL, and images are"):
        source[0]
    assert source[1].captions == {"en": ["a dog"]}


@pytest.mark.parametrize("language", ["Chinese", "zh.cn", ""])
def test_a_language_that_is_no_code_is_refused(language):
    with pytest.raises(ConfigError, match="expected a code such as zh or en"):
        SourceConfig(path="a.csv", captions={language: ("caption",)})
