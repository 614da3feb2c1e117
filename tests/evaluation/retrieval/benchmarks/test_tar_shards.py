"""WebDatasets are read as CLIP_benchmark's own exporter writes them, and damage is refused."""

import io
import multiprocessing
import tarfile

import pytest
import webdataset

from tests.builders import THINGS, encoded, make_image
from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.opening import open_benchmark

ZH = [zh for _, zh in THINGS]
EN = [en for en, _ in THINGS]
IMAGES = [encoded(make_image(number), "WEBP", lossless=True) for number in range(12)]


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(number, **parts):
    return [
        (f"s{number}.webp", IMAGES[number]),
        *((f"s{number}.{k}", v) for k, v in parts.items()),
    ]


def test_what_clip_benchmark_exports_is_read(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    dataset = [(IMAGES[n], [EN[n], f"a photo of a {EN[n]}"]) for n in range(12)]
    for number, (image, texts) in enumerate(dataset):  # as its webdataset_builder does
        with webdataset.TarWriter(str(tmp_path / "test" / f"{number}.tar")) as writer:
            writer.write({"__key__": f"s{number:07d}", "webp": image, "txt": "\n".join(texts)})
    found = open_benchmark(tmp_path)
    assert (found.kind, found.split) == ("webdataset", "test")
    assert found.image_ids[10] == "10/s0000010"
    assert list(found.images) == IMAGES
    assert found.captions["en"].texts == [text for _, texts in dataset for text in texts]
    assert found.captions["en"].pairs.tolist() == [[n, n // 2] for n in range(24)]
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        assert workers.apply(list, (found.images,)) == IMAGES
    assert open_benchmark(tmp_path / "test").captions["en"].texts == found.captions["en"].texts


def test_records_name_captions_by_language_or_without(tmp_path):
    records = [
        f'{{"captions": {{"zh": ["{ZH[0]}"], "en": "{EN[0]}"}}}}',
        f'{{"caption": ["{EN[1]}", "{EN[2]}"], "width": 3}}',
    ]
    members = [part for n, record in enumerate(records) for part in sample(n, json=record.encode())]
    found = open_benchmark(write_tar(tmp_path / "mine.tar", members))
    assert found.captions["zh"].texts == ZH[:1]
    assert found.captions["en"].texts == EN[:3]
    assert found.captions["en"].pairs.tolist() == [[0, 0], [1, 1], [2, 1]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample(0, cls=b"3"), "'s0' has class labels, so it is no retrieval benchmark"),
        (sample(0), "'s0' has no captions"),
        (sample(0, txt="灰猫".encode("gbk")), "'s0': its .txt is not text in UTF-8"),
        (sample(0, json=b"{"), "'s0', its .json is not JSON"),
        ([("s0.txt", b"a")], "'s0' needs one image, has txt"),
    ],
)
def test_a_sample_that_is_none_is_named(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        open_benchmark(write_tar(tmp_path / "0.tar", members))


def test_a_tar_that_is_cut_off_is_refused(tmp_path):
    members = [part for n in range(4) for part in sample(n, txt=EN[n].encode())]
    path = write_tar(tmp_path / "test" / "0.tar", members)
    content = path.read_bytes()
    for length in range(600, len(content) - 10_240, 997):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"0.tar cannot be read"):
            open_benchmark(tmp_path)
