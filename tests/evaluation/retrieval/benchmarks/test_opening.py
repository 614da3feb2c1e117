"""A path is recognised by what it holds; languages are told; images reach a model and workers."""

import json

import numpy as np
import pytest

from tests.builders import THINGS, encoded, make_image, tiny_bundle
from tests.evaluation.retrieval.benchmarks.opened import opened
from tests.support.processes import PROCESSES
from vlm.embedding.embedder import Embedder
from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.opening import kind_of

ZH = [zh for _, zh in THINGS]


def write_lines(path, texts):
    for number in range(len(texts)):
        (path.parent / f"{number}.png").write_bytes(encoded(make_image(number)))
    records = [{"image": f"{n}.png", "caption": text} for n, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_name_says_nothing_of_the_kind(tmp_path):
    for name in ("xm3600.tar", "dataset_coco.json", "flickr30k-cn_test.txt", "a.csv"):
        path = write_lines(tmp_path / name, ZH)
        assert kind_of(RetrievalSource(path=str(path))) == "m2-encoder"


@pytest.mark.parametrize("content", ["", "a\n", "{}\n", "[1]", "\x00\x01", "PAR1"])
def test_what_is_of_no_known_kind_lists_what_is_known(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    for unknown in (path, tmp_path):
        with pytest.raises(
            DataError,
            match=r"no benchmark of a known kind \(.*, table\), and as a source: ",
        ):
            opened(unknown)
    with pytest.raises(DataError, match=r"no\.csv does not exist"):
        opened(tmp_path / "no.csv")


def test_of_two_kinds_one_must_be_named(tmp_path):
    (tmp_path / "a.txt").write_text("0.png#0 a cat\n")
    (tmp_path / "b.csv").write_text("image,caption\n0.png,a dog\n")
    (tmp_path / "0.png").write_bytes(encoded(make_image(0)))
    with pytest.raises(DataError, match="may be numbered-captions or table; set kind"):
        opened(tmp_path)
    assert opened(tmp_path, kind="table").texts["en"].texts == ["a dog"]
    assert opened(tmp_path, kind="numbered-captions").texts["en"].texts == ["a cat"]


@pytest.mark.parametrize(
    ("texts", "language"),
    [(ZH, "zh"), (["T恤 3D 打印 新款", "红苹果"], "zh"), (["a cat", "un café"], "en")],
)
def test_the_language_is_told_by_the_letters(tmp_path, texts, language):
    found = opened(write_lines(tmp_path / "a.jsonl", texts))
    assert list(found.texts) == [language]
    assert f"taken for {'Chinese' if language == 'zh' else 'English'}" in found.findings["notes"][0]


@pytest.mark.parametrize("texts", [["猫がいる", "犬がいる"], ["고양이"], ["кошка"], ["12", "3"]])
def test_another_language_must_be_named(tmp_path, texts):
    path = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(
        DataError, match="clearly neither zh nor en; give the language of its captions: --language"
    ):
        opened(path)
    found = opened(path, language="xx")
    assert found.texts["xx"].texts == texts
    assert "notes" not in found.findings


def test_texts_without_any_caption_are_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [[], []])
    with pytest.raises(DataError, match="has no caption with an image"):
        opened(path)


def test_every_count_beyond_the_allowed_share_is_named_with_its_first_case(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["a cat", ["", "a dog"]])
    (tmp_path / "0.png").unlink()
    with pytest.raises(DataError) as caught:
        opened(path, allowed_share=0.3)
    assert str(caught.value) == (
        f"{path}: 1 of 2 images are not on the disk (first: '0.png' in {tmp_path}); 1 of 3 "
        "captions are empty (first: line 2); exceeds allowed_share 30.0%"
    )
    with pytest.raises(DataError, match=r"images are not on the disk .*; exceeds allowed_share 40"):
        opened(path, allowed_share=0.4)
    assert opened(path, allowed_share=0.5).texts["en"].texts == ["a dog"]


@pytest.mark.slow
def test_images_can_be_embedded_and_sent_to_workers(tmp_path):
    found = opened(write_lines(tmp_path / "a.jsonl", ZH[:5]))
    embedder = Embedder.load(tiny_bundle(tmp_path / "bundle"), device="cpu")
    vectors = embedder.encode_image(found.images, batch_size=2)
    expected = embedder.encode_image([make_image(number) for number in range(5)])
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    with PROCESSES.Pool(1) as workers:
        assert workers.apply(list, (found.images,)) == list(found.images)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"images": 3, "sentences": 1}', 'has no list of "images"; found images, sent'),
        ("a.json", b'{"images": [{"sentences": "\xbb\xd2', "byte 0xbb at 27 is not UTF-8"),
        ("a.json", b'{"images": [{"sentences": ', "is not JSON"),
        ("a.jsonl", b'{"image": "%s", "caption": "x"}' % (b"n" * 5000), "1 of 1 images are not"),
    ],
)
def test_what_only_looks_like_a_benchmark_is_refused_in_a_sentence(
    tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path / name)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "valid_texts.jsonl").mkdir()
    (tmp_path / "valid_imgs.tsv").touch()
    with pytest.raises(DataError, match=r"valid_texts.jsonl cannot be read: Is a directory"):
        opened(tmp_path)
