"""WebDatasets are read as CLIP_benchmark's own exporter writes them, and damage is refused."""

import gzip

import pytest
import webdataset

from tests.builders import THINGS, encoded, make_image, write_tar
from tests.evaluation.retrieval.benchmarks.opened import opened
from tests.support.processes import PROCESSES
from vlm.errors import DataError

ZH = [zh for _, zh in THINGS]
EN = [en for en, _ in THINGS]
IMAGES = [encoded(make_image(number), "WEBP", lossless=True) for number in range(12)]


def sample(number, **parts):
    return [
        (f"s{number}.webp", IMAGES[number]),
        *((f"s{number}.{k}", v) for k, v in parts.items()),
    ]


@pytest.mark.slow
def test_what_clip_benchmark_exports_is_read(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    dataset = [(IMAGES[n], [EN[n], f"a photo of a {EN[n]}"]) for n in range(12)]
    for number, (image, texts) in enumerate(dataset):  # as its webdataset_builder does
        with webdataset.TarWriter(str(tmp_path / "test" / f"{number}.tar")) as writer:
            writer.write({"__key__": f"s{number:07d}", "webp": image, "txt": "\n".join(texts)})
    found = opened(tmp_path)
    assert (found.kind, found.split) == ("webdataset", "test")
    assert found.image_names[10] == "10/s0000010"
    assert found.addresses[10] == f"{tmp_path}#10/s0000010"
    assert list(found.images) == IMAGES
    assert found.texts["en"].texts == [text for _, texts in dataset for text in texts]
    assert found.texts["en"].matches.tolist() == [[n, n // 2] for n in range(24)]
    with PROCESSES.Pool(1) as workers:
        assert workers.apply(list, (found.images,)) == IMAGES
    assert opened(tmp_path / "test").texts["en"].texts == found.texts["en"].texts


def test_records_name_captions_by_language_or_without(tmp_path):
    records = [
        f'{{"captions": {{"zh": ["{ZH[0]}"], "en": "{EN[0]}"}}}}',
        f'{{"caption": ["{EN[1]}", "{EN[2]}"], "width": 3}}',
    ]
    members = [part for n, record in enumerate(records) for part in sample(n, json=record.encode())]
    found = opened(write_tar(tmp_path / "mine.tar", members))
    assert found.texts["zh"].texts == ZH[:1]
    assert found.texts["en"].texts == EN[:3]
    assert found.texts["en"].matches.tolist() == [[0, 0], [1, 1], [2, 1]]


@pytest.mark.parametrize("is_folder", [True, False])
def test_packed_tars_are_what_they_are_unpacked(tmp_path, is_folder):
    members = [part for n in range(3) for part in sample(n, txt=EN[n].encode())]
    path = write_tar(tmp_path / "test" / "0.tar", members)
    expected = opened(path)
    packed = path.with_name("0.tar.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    found = opened(tmp_path if is_folder else packed)
    assert found.image_names == expected.image_names
    assert found.texts["en"].texts == EN[:3]
    assert list(found.images) == IMAGES[:3]
    with PROCESSES.Pool(1) as workers:
        assert workers.apply(list, (found.images,)) == IMAGES[:3]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample(0, cls=b"3"), "'s0' has class labels, so it is no retrieval benchmark"),
        (sample(0), "'s0' has no captions"),
        (sample(0, txt="灰猫".encode("gbk")), "'s0', its .txt: byte 0xbb at 0 is not UTF-8"),
        (sample(0, json=b"{"), "'s0', its .json is not JSON"),
        ([("s0.txt", b"a")], "'s0' needs one image, has txt"),
    ],
)
def test_a_sample_that_is_none_is_named(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        opened(write_tar(tmp_path / "0.tar", members))


def test_a_tar_that_is_cut_off_is_refused(tmp_path):
    members = [part for n in range(4) for part in sample(n, txt=EN[n].encode())]
    path = write_tar(tmp_path / "test" / "0.tar", members)
    content = path.read_bytes()
    for length in range(600, len(content) - 10_240, 997):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"0.tar cannot be read"):
            opened(tmp_path)


def test_lines_of_a_text_end_with_a_line_feed_alone(tmp_path):
    texts = ["a cat\u2028on a wall", "a dog\x0cand\x85more"]
    members = sample(0, txt="\r\n".join(texts).encode() + b"\n")
    found = opened(write_tar(tmp_path / "0.tar", members))
    assert found.texts["en"].texts == texts


def test_members_of_one_sample_need_not_be_neighbours(tmp_path):
    members = [part for n in range(2) for part in sample(n, txt=EN[n].encode())]
    found = opened(write_tar(tmp_path / "0.tar", [*members[::2], *members[1::2]]))
    assert found.texts["en"].texts == EN[:2]
    assert list(found.images) == IMAGES[:2]


def test_half_a_character_is_named_with_its_sample(tmp_path):
    members = sample(0, json=b'{"caption": "a cat \\ud83d"}')
    with pytest.raises(DataError, match=r"0.tar, 's0': '\\ud83d' is half a character"):
        opened(write_tar(tmp_path / "0.tar", members))


def test_a_split_of_shards_without_a_manifest_is_answered_with_how_to_write_one(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "train-00000.tar")) as writer:
        writer.write({"__key__": "a", "webp": IMAGES[0], "txt": EN[0]})
    with pytest.raises(DataError, match=rf"no split 'train'; .* `vlm data index {tmp_path}`"):
        opened(tmp_path, split="train")
