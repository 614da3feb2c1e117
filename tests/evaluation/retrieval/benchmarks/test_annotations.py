"""M2-Encoder's lines and Karpathy's files: captions, splits, and images found by their names."""

import json

import pytest

from tests.builders import THINGS, encoded, make_image
from tests.evaluation.retrieval.benchmarks.opened import opened
from vlm.errors import DataError

ZH = [zh for _, zh in THINGS]
EN = [en for en, _ in THINGS]


def write_images(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(make_image(number), "JPEG"))


def write_lines(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def karpathy(path, *pictures, **more):
    images = [
        {"filename": name, "split": split, "sentids": [1], "imgid": number,
         "sentences": [{"tokens": text.split(), "raw": text, "imgid": number} for text in texts]}
        | more
        for number, (name, split, texts) in enumerate(pictures)
    ]  # fmt: skip
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def test_lines_of_m2_encoder_are_read_as_they_were_written(tmp_path):
    write_images(tmp_path, ["val2014/a.jpg", "b.jpg"])
    path = write_lines(
        tmp_path / "coco-cn_test.jsonl",
        {"image": "val2014/a.jpg", "caption": [ZH[0], ZH[1]]},
        {"image": "b.jpg", "caption": f"{ZH[2]}\n"},
    )
    found = opened(path)
    assert (found.kind, found.split) == ("m2-encoder", "")
    assert list(found.images) == [tmp_path / "val2014/a.jpg", tmp_path / "b.jpg"]
    assert found.texts["zh"].texts == ZH[:3]
    assert found.texts["zh"].matches.tolist() == [[0, 0], [1, 0], [2, 1]]
    assert found.cleaning == "line ends removed"
    assert not found.addresses  # each image is a file


def test_an_image_on_two_lines_has_the_captions_of_both(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    record = {"image": "a.jpg", "caption": ZH[0]}
    found = opened(write_lines(tmp_path / "m.jsonl", record, record))
    assert found.image_names == ["a.jpg"]
    assert found.texts["zh"].matches.tolist() == [[0, 0], [1, 0]]
    assert found.findings["duplicate_image_ids"] == found.findings["duplicate_captions"] == 1


def test_images_lie_below_the_folder_that_is_named(tmp_path):
    write_images(tmp_path / "coco", ["val2014/a.jpg", "deep/er/b.png"])
    records = [{"image": "a.jpg", "caption": ZH[0]}, {"image": "b", "caption": ZH[1]}]
    path = write_lines(tmp_path / "m.jsonl", *records)
    found = opened(path, images=tmp_path / "coco")
    assert [p.name for p in found.images] == ["a.jpg", "b.png"]
    with pytest.raises(DataError, match=r"2 of 2 images are not on the disk \(first: 'a.jpg' in"):
        opened(path)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        opened(path, images=tmp_path / "nowhere")


def test_a_name_that_two_images_have_finds_neither(tmp_path):
    write_images(tmp_path / "coco", ["train/a.jpg", "val/a.jpg"])
    path = write_lines(tmp_path / "m.jsonl", {"image": "a.jpg", "caption": ZH[0]})
    with pytest.raises(DataError, match="1 of 1 images"):
        opened(path, images=tmp_path / "coco")


def test_missing_images_within_the_share_are_left_out_with_their_captions(tmp_path):
    names = [f"{number}.jpg" for number in range(4)]
    write_images(tmp_path, names[:3])
    records = [{"image": n, "caption": [t, ""]} for n, t in zip(names, ZH, strict=False)]
    path = write_lines(tmp_path / "m.jsonl", *records)
    with pytest.raises(DataError, match="4 of 8 captions are empty"):
        opened(path, allowed_share=0.3)
    found = opened(path, allowed_share=0.5)
    assert found.image_names == names[:3]
    assert found.texts["zh"].texts == ZH[:3]
    assert (found.findings["missing_images"], found.findings["empty_captions"]) == (1, 4)
    assert found.findings["examples"]["missing_images"].startswith("'3.jpg' in ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.jpg", "caption"', "m.jsonl, line 2 is not JSON"),
        ({"image": "a.jpg"}, 'm.jsonl, line 2 has no "image" with a "caption"; found image'),
        ({"image": "a.jpg", "caption": [1]}, "m.jsonl, line 2: found 1; expected a text"),
    ],
)
def test_a_broken_line_is_named_with_its_number(tmp_path, line, message):
    path = write_lines(tmp_path / "m.jsonl", {"image": "a.jpg", "caption": ZH[0]}, line)
    with pytest.raises(DataError, match=message):
        opened(path)


def test_text_in_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"image": "a.jpg", "caption": "x"}\n' + '{"image": "灰猫"}'.encode("gbk"))
    with pytest.raises(DataError, match="line 2: byte 0xbb at 11 is not UTF-8"):
        opened(path)


def test_a_split_of_karpathy_is_read(tmp_path):
    write_images(tmp_path, ["val2014/a.jpg", "val2014/b.jpg", "val2014/c.jpg", "val2014/d.jpg"])
    path = karpathy(
        tmp_path / "dataset_coco.json",
        ("a.jpg", "test", EN[:2]), ("b.jpg", "train", EN[2:3]), ("c.jpg", "restval", EN[3:4]),
        ("d.jpg", "test", EN[4:5]), filepath="val2014",
    )  # fmt: skip
    found = opened(path)
    assert (found.kind, found.split) == ("karpathy", "test")
    assert list(found.images) == [tmp_path / "val2014/a.jpg", tmp_path / "val2014/d.jpg"]
    assert found.texts["en"].texts == [EN[0], EN[1], EN[4]]
    assert found.texts["en"].matches.tolist() == [[0, 0], [1, 0], [2, 1]]
    train = opened(path, split="train")
    assert train.texts["en"].texts == EN[2:4]
    with pytest.raises(DataError, match="no split 'restval'; its splits are test, train"):
        opened(path, split="restval")


def test_flickr30k_has_no_folders_in_its_names(tmp_path):
    write_images(tmp_path / "flickr30k-images", ["1.jpg"])
    path = karpathy(tmp_path / "dataset_flickr30k.json", ("1.jpg", "test", EN[:1]))
    found = opened(path, images=tmp_path / "flickr30k-images")
    assert found.image_names == ["1.jpg"]


def test_an_image_without_sentences_is_refused(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('{"images": [{"filename": "a.jpg", "split": "test", "sentences": [{}]}]}')
    with pytest.raises(DataError, match=r"d.json has an image without"):
        opened(path)
