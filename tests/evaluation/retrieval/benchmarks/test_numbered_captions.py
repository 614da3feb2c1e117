"""COCO-CN's and Flickr30k-CN's own files: splits by lists of ids, part-of-speech tags removed."""

import pytest

from tests.builders import THINGS, encoded, make_image
from tests.evaluation.retrieval.benchmarks.opened import opened
from vlm.errors import DataError

ZH = [zh for _, zh in THINGS]
IDS = [
    f"COCO_{part}2014_{number:012d}" for number, part in enumerate(["val", "train", "val", "val"])
]
LINES = [(IDS[0], 0, ZH[0]), (IDS[3], 0, ZH[5]), (IDS[1], 0, ZH[1]), (IDS[0], 1, ZH[2])]


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def coco(tmp_path):
    for number, name in enumerate(IDS):
        path = tmp_path / "images" / name[5:-13] / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(make_image(number), "JPEG"))
    folder = tmp_path / "coco-cn-version1805v1.1"
    write(folder / "coco-cn_test.txt", IDS[:2])
    write(folder / "coco-cn_train.txt", IDS[2:])
    write(folder / "imageid.human-written-caption.txt", [f"{i}#{k}\t{t}" for i, k, t in LINES])
    write(folder / "imageid.human-written-tags.txt", [f"{i} 猫 狗" for i in IDS])
    return folder


def open_coco(path, coco, **options):
    return opened(path, images=coco.parent / "images", **options)


def test_a_split_of_coco_cn_is_read_as_it_was_written(coco):
    found = open_coco(coco, coco)
    assert (found.kind, found.split) == ("numbered-captions", "test")
    assert found.image_names == IDS[:2]
    assert [p.stem for p in found.images] == IDS[:2]
    assert found.texts["zh"].texts == [ZH[0], ZH[1], ZH[2]]
    assert found.texts["zh"].matches.tolist() == [[0, 0], [1, 1], [2, 0]]
    assert found.findings["notes"][0] == "captions of imageid.human-written-caption.txt"
    train = open_coco(coco, coco, split="train")
    assert train.texts["zh"].texts == [ZH[5]]
    assert train.findings["images_without_caption"] == 1


def test_another_protocol_is_asked_for_by_its_file(coco):
    path = write(coco / "imageid.manually-translated-caption.txt", [f"{IDS[1]}#0 {ZH[7]}"])
    assert open_coco(coco, coco).texts["zh"].texts == [ZH[0], ZH[1], ZH[2]]
    assert open_coco(path, coco).texts["zh"].texts == [ZH[7]]
    (coco / "imageid.human-written-caption.txt").rename(coco / "mine.txt")
    with pytest.raises(DataError, match=r"several files of captions: imageid.manual.*, mine.txt"):
        open_coco(coco, coco)


@pytest.mark.parametrize("sign", [":", "#", "/"])
def test_part_of_speech_tags_are_removed(coco, sign):
    path = coco / "imageid.human-written-caption.txt"
    tagged = [
        f"{i}#{k} 一{sign}m 只{sign}q {t}{sign}n ，{sign}wd iPad{sign}nx 2{sign}m"
        for i, k, t in LINES
    ]
    found = open_coco(write(path, tagged), coco)
    assert found.texts["zh"].texts == [f"一只{t}，iPad 2" for t in (ZH[0], ZH[1], ZH[2])]
    assert found.findings.get("tagged_captions", 0) == 3
    assert found.cleaning == "line ends removed; part-of-speech tags removed and words joined"


def test_texts_with_few_signs_that_look_like_tags_stay(coco):
    path = coco / "imageid.human-written-caption.txt"
    texts = ["评分 3:a 的 猫", "一只 猫", "狗 和/n 猫"]
    lines = [f"{i}#{k}\t{t}" for (i, k, _), t in zip([LINES[0], *LINES[2:]], texts, strict=True)]
    found = open_coco(write(path, lines), coco)
    assert found.texts["zh"].texts == texts
    assert found.findings.get("tagged_captions", 0) == 0


def test_flickr30k_cn_keeps_lists_and_texts_in_folders(tmp_path):
    name = "flickr30kzhmbosontest"
    write(tmp_path / name / "ImageSets" / f"{name}.txt", ["1007", "1009"])
    lines = ["1009#zhm#0 小:a 狗:n 。:w", "1007#zhm#0 猫:n", "1007#zhm#1 绿茶:n"]
    write(tmp_path / name / "TextData" / f"seg.{name}.caption.txt", lines)
    for number in (1007, 1009):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(make_image(number), "JPEG"))
    found = opened(tmp_path / name, images=tmp_path)
    assert found.image_names == ["1007", "1009"]
    assert found.texts["zh"].texts == ["小狗。", "猫", "绿茶"]
    assert found.texts["zh"].matches.tolist() == [[0, 1], [1, 0], [2, 0]]


def test_a_file_without_lists_has_the_images_that_it_names(tmp_path):
    lines = [f"{7 - n // 2}.jpg#{n % 2}\t{ZH[n]}" for n in range(4)]
    path = write(tmp_path / "test" / "flickr30k_cn_test.txt", lines)
    for number in (6, 7):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(make_image(number), "JPEG"))
    found = opened(path, images=tmp_path)
    assert found.image_names == ["7.jpg", "6.jpg"]
    assert found.texts["zh"].texts == ZH[:4]
    with pytest.raises(DataError, match="no split 'val'; it has no splits"):
        opened(path, images=tmp_path, split="val")


def test_captions_that_no_list_names_are_refused(coco):
    path = coco / "imageid.human-written-caption.txt"
    with path.open("a") as file:
        file.write(f"COCO_val2014_9#0\t{ZH[0]}\n")
    with pytest.raises(DataError, match=r"1 of 4 captions name .*line 5, 'COCO_val2014_9'"):
        open_coco(coco, coco)


def test_lists_of_other_images_are_noted(coco):
    write(coco / "coco-cn_test.txt", ["COCO_val2014_77"])
    write(coco / "coco-cn_train.txt", ["COCO_val2014_78"])
    with pytest.raises(DataError, match="no split 'test'"):
        open_coco(coco, coco, split="test")
    found = open_coco(coco, coco)
    assert len(found.image_names) == 3
    assert "coco-cn_test.txt, coco-cn_train.txt name none of them" in found.findings["notes"][0]


def test_a_line_that_is_no_caption_is_named(coco):
    path = coco / "imageid.human-written-caption.txt"
    with path.open("a") as file:
        file.write("COCO_val2014_9 caption\n")
    with pytest.raises(DataError, match="line 5 is 'COCO_val2014_9 caption'; expected IMAGE#"):
        open_coco(coco, coco)


def test_a_caption_may_be_empty(coco):
    path = coco / "imageid.human-written-caption.txt"
    with path.open("a") as file:
        file.write(f"{IDS[1]}#1\n{IDS[1]}#2 \n")
    with pytest.raises(DataError, match=r"2 of 5 captions are empty \(first: line 5\)"):
        open_coco(coco, coco)
