"""Chinese-CLIP's folders are read as its own scripts read them, from base64 and from LMDB."""

import base64
import json
import pickle
import subprocess
import sys
import tracemalloc

import lmdb
import pytest
import torch

from tests.builders import THINGS, encoded, make_image
from tests.evaluation.retrieval.benchmarks.opened import opened
from tests.support.processes import PROCESSES
from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.chinese_clip import list_chinese_clip
from vlm.images.decoding import decode_image

ZH = [zh for _, zh in THINGS]
IMAGES = {str(900 + number): encoded(make_image(number)) for number in (5, 1, 4, 2)}
TEXTS = [
    {"text_id": 8, "text": ZH[0], "image_ids": [901]},
    {"text_id": 9, "text": ZH[1], "image_ids": [905, 904]},
    {"text_id": 7, "text": ZH[0], "image_ids": [902]},
]


def write(folder, texts=TEXTS, images=IMAGES, *, split="valid", encode=base64.urlsafe_b64encode):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(text, ensure_ascii=False) + "\n" for text in texts]
    (folder / f"{split}_texts.jsonl").write_text("".join(lines), encoding="utf-8")
    with (folder / f"{split}_imgs.tsv").open("wb") as file:
        for name, content in images.items():
            file.write(name.encode() + b"\t" + encode(content) + b"\n")
    return folder


def build_lmdb(folder, split="valid"):
    """Write what Chinese-CLIP's own script writes of a split."""
    for part in ("imgs", "pairs"):
        (folder / "lmdb" / split / part).mkdir(parents=True)
    lines = (folder / f"{split}_imgs.tsv").read_text().splitlines()
    values = [tuple(line.split("\t")) for line in lines]
    pairs = [(number, pickle.dumps(("901", 8, "text"))) for number in range(3)]
    for part, items, count in (("imgs", values, "num_images"), ("pairs", pairs, "num_samples")):
        store = str(folder / "lmdb" / split / part)
        with lmdb.open(store) as environment, environment.begin(write=True) as transaction:
            for key, value in [*items, (count, str(len(dict(items))))]:
                content = value.encode() if isinstance(value, str) else value
                transaction.put(str(key).encode(), content)


def refusal_of(path, **options):
    with pytest.raises(DataError) as caught:
        opened(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("encode", [base64.urlsafe_b64encode, base64.b64encode])
def test_a_folder_is_read_as_it_was_written(tmp_path, encode):
    folder = write(tmp_path / "muge", encode=encode)
    found = opened(folder)
    assert (found.kind, found.split) == ("chinese-clip", "valid")
    assert found.image_names == list(IMAGES)
    assert list(found.images) == list(IMAGES.values())
    assert found.images[1:3] == list(IMAGES.values())[1:3]
    assert set(found.texts) == {"zh"}
    assert found.texts["zh"].texts == [ZH[0], ZH[1], ZH[0]]
    captions = found.texts["zh"]
    assert captions.matches.tolist() == [[0, 1], [1, 0], [1, 2], [2, 3]]
    assert len(opened(folder, duplicates="by string").texts["zh"].matches) == 6
    assert found.findings.get("duplicate_captions", 0) == 1
    assert found.findings.get("images_without_caption", 0) == 0


@pytest.mark.slow
def test_an_lmdb_holds_the_same(tmp_path):
    folder = write(tmp_path / "muge")
    from_lines = opened(folder)
    build_lmdb(folder)
    (folder / "valid_imgs.tsv").unlink()
    found = opened(folder)
    assert dict(zip(found.image_names, found.images, strict=True)) == IMAGES
    for text, place in found.texts["zh"].matches.tolist():
        assert int(found.image_names[place]) in TEXTS[text]["image_ids"]
    assert found.texts["zh"].texts == from_lines.texts["zh"].texts
    with PROCESSES.Pool(1) as workers:
        assert workers.apply(list, (found.images,)) == list(found.images)


def test_texts_and_images_are_those_of_their_evaluation(tmp_path):
    theirs = pytest.importorskip("cn_clip.eval.data", reason="Chinese-CLIP is not installed")
    folder = write(tmp_path / "muge")
    script = ["cn_clip.preprocess.build_lmdb_dataset", "--data_dir", folder, "--splits", "valid"]
    subprocess.run([sys.executable, "-m", *script], check=True, capture_output=True)
    texts = theirs.EvalTxtDataset(str(folder / "valid_texts.jsonl")).texts
    images = theirs.EvalImgDataset(str(folder / "lmdb" / "valid" / "imgs"), resolution=16)
    pictures = [images[number] for number in range(len(images))]
    images.env_imgs.close()
    (folder / "valid_imgs.tsv").unlink()
    found = opened(folder)
    assert [text for _, text in texts] == found.texts["zh"].texts
    assert [str(name) for name, _ in pictures] == found.image_names
    for (_, expected), content in zip(pictures, found.images, strict=True):
        assert torch.equal(images.transform(decode_image(content)), expected)


def test_texts_that_are_only_there_as_pickles_are_refused(tmp_path):
    folder = write(tmp_path / "muge")
    build_lmdb(folder)
    for path in folder.glob("valid_*"):
        path.unlink()
    assert "as pickles, which are not read" in refusal_of(folder)


def test_without_the_package_an_lmdb_says_what_is_needed(tmp_path, monkeypatch):
    folder = write(tmp_path / "muge")
    (folder / "valid_imgs.tsv").rename(folder / "elsewhere")
    (folder / "lmdb" / "valid" / "imgs").mkdir(parents=True)
    assert "cannot be read as an LMDB" in refusal_of(folder)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "`pip install lmdb`" in refusal_of(folder)


def test_an_lmdb_that_lacks_images_is_refused(tmp_path):
    folder = write(tmp_path / "muge")
    (folder / "valid_imgs.tsv").unlink()
    store = folder / "lmdb" / "valid" / "imgs"
    store.mkdir(parents=True)
    with lmdb.open(str(store)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"901", base64.b64encode(IMAGES["901"]))
        transaction.put(b"num_images", b"4")
    assert "holds 1 images but says b'4'" in refusal_of(folder)


def test_the_split_is_asked_for_or_clear(tmp_path):
    folder = write(tmp_path / "muge")
    write(folder, split="train")
    assert refusal_of(folder) == f"{folder} has the splits train, valid; choose one of them"
    assert refusal_of(folder, split="val").endswith("its splits are train, valid")
    assert opened(folder, split="train").split == "train"
    assert opened(folder / "valid_texts.jsonl").split == "valid"
    write(folder, split="test")
    assert opened(folder).split == "test"


def test_texts_of_another_split_are_refused(tmp_path):
    folder = write(tmp_path / "muge", [text | {"image_ids": [77]} for text in TEXTS])
    assert "3 of 3 captions name an image that is not listed (first: line 1, '77')" in refusal_of(
        folder, allowed_share=0.9
    )
    write(folder, [text | {"image_ids": []} for text in TEXTS])
    assert "(first: line 1, which names no image)" in refusal_of(folder)


def test_unknown_ids_within_the_share_are_left_out_and_counted(tmp_path):
    texts = [*TEXTS, {"text_id": 1, "text": ZH[3], "image_ids": [902, 77]}]
    found = opened(write(tmp_path / "muge", texts), allowed_share=0.25)
    assert found.findings.get("unknown_ids", 0) == 1
    assert found.texts["zh"].texts[3] == ZH[3]
    assert found.texts["zh"].matches[-1].tolist() == [3, 3]


def test_a_later_image_replaces_one_of_the_same_id_as_in_their_lmdb(tmp_path):
    folder = write(tmp_path / "muge")
    other = encoded(make_image(9))
    with (folder / "valid_imgs.tsv").open("ab") as file:
        file.write(b"904\t" + base64.b64encode(other) + b"\n")
    found = opened(folder)
    assert found.findings.get("duplicate_image_ids", 0) == 1
    build_lmdb(folder)
    with lmdb.open(str(folder / "lmdb/valid/imgs"), readonly=True, lock=False) as environment:
        theirs = environment.begin().get(b"904")
    assert found.images[found.image_names.index("904")] == other == base64.b64decode(theirs)


@pytest.mark.parametrize("line", [b"no tab here", b"\tabc"])
def test_a_line_of_images_without_an_id_is_named(tmp_path, line):
    folder = write(tmp_path / "muge")
    with (folder / "valid_imgs.tsv").open("ab") as file:
        file.write(b"\n" + line + b"\n")
    assert "valid_imgs.tsv, line 6 is no image" in refusal_of(folder)


@pytest.mark.parametrize("encode", [lambda b: b"b'" + base64.b64encode(b), lambda b: b"abcde"])
def test_an_image_that_is_not_base64_is_named_with_its_line(tmp_path, encode):
    folder = write(tmp_path / "muge", encode=encode)
    listing = list_chinese_clip(RetrievalSource(path=str(folder)))
    with pytest.raises(DataError, match=r"valid_imgs.tsv, line 3 is not an image in base64"):
        listing.read(2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text_id": 1, "text": "a"', "line 4 is not JSON"),
        ("[1]", "line 4 is a JSON list; expected an object"),
        ('{"text_id": 1, "image_ids": [1]}', 'line 4 has no "text" with a list of "image_ids"'),
    ],
)
def test_a_broken_line_of_texts_is_named(tmp_path, line, message):
    folder = write(tmp_path / "muge")
    with (folder / "valid_texts.jsonl").open("a") as file:
        file.write(line)
    assert message in refusal_of(folder)


def test_images_are_not_held_in_memory(tmp_path):
    large = {str(number): encoded(make_image(number)) * 2000 for number in range(50)}
    texts = [{"text_id": n, "text": ZH[0], "image_ids": [n]} for n in range(50)]
    folder = write(tmp_path / "muge", texts, large)
    size = (folder / "valid_imgs.tsv").stat().st_size
    tracemalloc.start()
    found = opened(folder)
    for content in found.images:
        assert content
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 15_000_000
    assert peak < size / 8
