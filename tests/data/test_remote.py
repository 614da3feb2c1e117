"""Sources on a web server are those of a folder, and their failures are those of the place."""

import os
import shutil
from functools import partial
from threading import Thread
from time import monotonic, sleep

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.builders import (
    THINGS,
    encoded,
    make_image,
    make_samples,
    tiny_tokenizer,
    write_img2dataset,
    write_split,
)
from tests.support.processes import run_in_world
from tests.support.web_server import WebServer
from vlm.batches.config import CaptionConfig, DataConfig, MixedSourceConfig
from vlm.batches.examples import TrainingExamples
from vlm.batches.loader import TrainingLoader
from vlm.batches.mixture import BatchOrder, Mixture
from vlm.batches.order import SourceOrder
from vlm.cli.main import main
from vlm.data import copies, layout, manifest
from vlm.data.config import SourceConfig
from vlm.data.indexing import index_folder
from vlm.data.source import open_source
from vlm.errors import DataError, PlaceError, ShardError
from vlm.images.config import AugmentationConfig, PreprocessConfig
from vlm.images.transforms import TrainingTransform
from vlm.storage.node_cache import NodeCache

EN = [en for en, _ in THINGS]
TARS = [f"{number:05d}.tar" for number in range(4)]
INDEXES = [f"{name}.arrow" for name in TARS]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_img2dataset(tmp_path_factory.mktemp("data") / "tars", EN, samples_per_shard=3)


@pytest.fixture
def web(tars, tmp_path):
    """Serve a data folder as `pairs`, and whatever tests write next to it."""
    folder = tmp_path / "web"
    shutil.copytree(tars, folder / "pairs")
    index_folder(folder / "pairs")
    with WebServer(folder) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(copies, "NodeCache", partial(NodeCache, patience=0.5))
    for module, name in ((layout, "state_of"), (manifest, "read_small")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), patience=0.5))


def opened(path, *, cache_gib=1.0, verify="once", **settings):
    return open_source(SourceConfig(path=str(path), **settings), cache_gib=cache_gib, verify=verify)


def fields_of(source):
    """Return all of the samples but where they lie."""
    return [(s.uid, s.image, s.captions, s.concept, s.source, s.licence, s.labels) for s in source]


def fetched(web, *names):
    return sorted(line.split()[1] for line in web.log("GET") if line.split()[1] in names)


def batches_of(source, *, first=0, steps=6, workers=0, rank=0, world_size=1):
    """Return images and uids of a rank's batches of 4, which are read in a random order."""
    order = BatchOrder(
        [SourceOrder("data", np.array(source.sizes), block=6)], Mixture(phases=[(None, [1.0])]), 4,
        rank=rank, world_size=world_size,
    )  # fmt: skip
    transform = TrainingTransform(PreprocessConfig(), AugmentationConfig(), 16)
    captions = CaptionConfig(languages=("en",))
    examples = TrainingExamples([source], order.sources, transform, captions, seed=0)
    state = order.start()
    for _ in range(first):
        order.advance(state)
    read = TrainingLoader(examples, order, tiny_tokenizer(), workers=workers).read(state, steps)
    return [(batch.images.tolist(), batch.uids) for batch in read]


# Data folders


def test_a_data_folder_is_that_of_the_disk_and_each_file_is_fetched_once(web):
    url = web.url("pairs")
    source = opened(url)
    assert web.log("") == ["GET manifest.json - 200"]
    assert fields_of(source) == fields_of(opened(web.folder / "pairs"))
    assert fields_of(opened(url)) == fields_of(source)
    assert fetched(web, *TARS, *INDEXES) == sorted([*TARS, *INDEXES])
    assert source[4].address == source.address(1, 1) == f"{url}/00001.tar#1"
    assert source.name == f"the split 'train' of {url}"


def test_what_the_index_has_is_read_without_the_shards(web):
    source = opened(web.url("pairs"), where=("concept!=x",))
    assert [row["uid"] for row in source.rows(1, ["uid"])] == [
        "000010000",
        "000010001",
        "000010002",
    ]
    assert len(source.label_ids("group", 0)) == 3
    assert fetched(web, *TARS) == []


def test_shards_without_an_index_are_looked_through_once(web, cache):
    shutil.rmtree(web.folder / "pairs/index")
    for _ in range(2):
        assert fields_of(opened(web.url("pairs"))) == fields_of(opened(web.folder / "pairs"))
    assert fetched(web, *TARS) == TARS
    assert len(web.log("HEAD", ".arrow")) == 4
    assert len(list((cache / "index").glob("*.arrow"))) == 8  # of the URL, and of the folder


def test_a_place_may_refuse_an_index_that_it_does_not_have(web):
    source = opened(web.url("pairs"))
    web.restart(status=403, fail_every=1, only=".arrow")
    assert fields_of(source) == fields_of(opened(web.folder / "pairs"))


def test_an_index_of_other_fields_or_another_shard_is_not_used(web):
    named = {"captions": {"en": ("json.key",)}}
    assert opened(web.url("pairs"), **named)[4].captions == {"en": ["000010001"]}
    index = web.folder / "pairs/index"
    (index / "00000.tar.arrow").write_bytes((index / "00001.tar.arrow").read_bytes())
    assert fields_of(opened(web.url("pairs"))) == fields_of(opened(web.folder / "pairs"))


def test_packed_shards_of_several_splits_are_read(web):
    folder = write_split(web.folder / "own", make_samples(4), samples_per_shard=3)
    write_split(folder, make_samples(2), split="val")
    assert fields_of(opened(web.url("own"))) == fields_of(make_samples(4))
    assert len(opened(web.url("own"), split="val")) == 2
    with pytest.raises(DataError, match="has no split 'test'; its splits are train, val"):
        opened(web.url("own"), split="test")


def test_the_name_of_a_source_leaves_out_what_may_be_a_signature():
    data = DataConfig(sources=(MixedSourceConfig(path="https://host/pairs?signature=secret"),))
    assert list(data.by_name) == ["pairs"]


# Tars and tables


def test_tars_are_those_of_the_disk_and_each_is_fetched_once(web):
    (web.folder / "pairs/manifest.json").unlink()
    url, own = web.url("pairs/{00000..00003}.tar"), web.folder / "pairs/{00000..00003}.tar"
    for _ in range(2):
        source = opened(url)
        assert fields_of(source) == fields_of(opened(own))
    assert fetched(web, *TARS) == TARS
    assert source[4].uid == "00001/000010001"


def test_a_tar_that_has_changed_at_its_place_is_looked_through_again(web):
    path, url = web.folder / "pairs/00000.tar", web.url("pairs/{00000..00003}.tar")
    assert opened(url)[2].captions == {"en": ["small dog"]}
    path.write_bytes(path.read_bytes().replace(b"small dog", b"large dog"))
    assert opened(url)[2].captions == {"en": ["large dog"]}
    assert fetched(web, *TARS) == ["00000.tar", *TARS]


def test_a_tar_that_changes_while_a_source_is_open_is_an_error_with_its_name(web, cache):
    path = web.folder / "pairs/00001.tar"
    source = opened(web.url("pairs/{00000..00003}.tar"))
    path.write_bytes(path.read_bytes().replace(b"JFIF", b"FIFJ"))
    shutil.rmtree(cache / "shards")
    with pytest.raises(ShardError, match=r"/pairs/00001\.tar was fetched twice and is damaged"):
        source[4]
    assert source[0].captions == {"en": [EN[0]]}


def test_tables_hold_their_images_or_name_those_of_this_machine(web, tmp_path):
    images = [encoded(make_image(number)) for number in range(4)]
    table = pyarrow.table({"image": images, "zh": [zh for _, zh in THINGS[:4]]})
    pyarrow.parquet.write_table(table, web.folder / "a.parquet")
    source = opened(web.url("a.parquet"))
    assert [sample.image for sample in source] == images
    assert fields_of(source) == fields_of(opened(web.folder / "a.parquet"))
    (tmp_path / "0.png").write_bytes(images[0])
    (web.folder / "a.csv").write_text("image,caption\n0.png,a cat\n1.png,\n")
    said = r"/a\.csv has the paths of images, such as '0\.png', which are not fetched one by one; "
    with pytest.raises(DataError, match=said):
        opened(web.url("a.csv"))
    named = opened(web.url("a.csv"), images=tmp_path)
    assert named[0].image == images[0]
    with pytest.raises(DataError, match=rf"^{web.url('a.csv')}, line 3: found no caption in"):
        named[1]


@pytest.mark.usefixtures("web")
def test_manifest_and_indexes_of_tars_are_written_to_be_uploaded(web, tmp_path, capsys):
    for path in (web.folder / "pairs/manifest.json", web.folder / "pairs/index"):
        path.rename(tmp_path / path.name)
    arguments = ["data", "index", web.url("pairs/{00000..00003}.tar"), "--out"]
    assert main([*arguments, f"{tmp_path}/out"]) == 0
    assert capsys.readouterr().out == "train: 12 samples in 4 shards\n"
    written = tmp_path / "out/manifest.json"
    assert written.read_bytes() == (tmp_path / "manifest.json").read_bytes()
    shutil.copytree(tmp_path / "out", web.folder / "pairs", dirs_exist_ok=True)
    source = opened(web.url("pairs"))
    assert [row["uid"] for row in source.rows(0, ["uid"])] == [s.uid for s in source][:3]
    assert fetched(web, *INDEXES) == INDEXES
    assert main(["data", "index", str(web.folder / "pairs"), "--out", f"{tmp_path}/out"]) == 2
    assert "is not a folder of tars at a place; expected an address" in capsys.readouterr().err


def test_what_is_at_a_place_is_shown_and_checked(web, capsys):
    url = web.url("pairs")
    assert main(["data", "show", url]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"{url}: data folder, 12 samples in 4 shards\nfield json.caption: zh or en"
    )
    assert main(["data", "check", url]) == 0
    assert capsys.readouterr().out == "train: 12 samples, all readable\n"


# What is wrong


def test_an_address_without_a_source_says_what_was_expected(web, impatient):
    for name, said in {
        "none?signature=secret": r"/none/manifest\.json is not there; expected a data folder, or",
        "pairs/00009.tar": r"/pairs/00009\.tar is not there",
        "pairs/*.tar": "web servers list no files; expected braces",
        "pairs/{0..2.tar": "unbalanced braces",
        "pairs/manifest.json": r"manifest\.json/manifest\.json is not there",
    }.items():
        with pytest.raises(DataError, match=said) as caught:
            opened(web.url(name))
        assert "secret" not in str(caught.value)
    (web.folder / "pairs/manifest.json").write_text("{}")
    with pytest.raises(DataError, match=rf"^{web.url('pairs/manifest.json')} is not a manifest"):
        opened(web.url("pairs"))


def test_a_missing_or_damaged_shard_is_named_and_the_others_are_read(web):
    folder = web.folder / "pairs"
    (folder / "00000.tar").unlink()
    content = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    (folder / "00002.tar").write_bytes(content + b"0")
    source = opened(web.url("pairs"))
    for index, said in enumerate(
        [r"00000\.tar is not there", r"00001\.tar was fetched twice and is damaged", "has changed"]
    ):
        for _ in range(2):
            with pytest.raises(ShardError, match=said):
                source[3 * index]
    assert source[9].captions == {"en": [EN[9]]}
    assert len(fetched(web, *TARS)) == 4  # the damaged one twice, and the last once


def test_a_copy_that_is_damaged_later_is_found_where_each_opening_verifies(web, cache):
    list(opened(web.url("pairs")))
    for path in (cache / "shards").glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    said = rf"shard {web.url('pairs/00000.tar')} is damaged: sha256"
    with pytest.raises(ShardError, match=said):
        opened(web.url("pairs"), verify="each_open")[0]


def test_a_place_that_stays_away_is_no_damage_that_other_samples_replace(web, impatient):
    source = opened(web.url("pairs"))
    web.kill()
    for read in (
        lambda: source[0],
        lambda: batches_of(source),
        lambda: batches_of(source, workers=1),
    ):
        with pytest.raises(PlaceError, match=r"^http\S+ stayed away for 0\.5 s, in .*$"):
            read()
    with pytest.raises(PlaceError, match=r"manifest\.json stayed away for 0\.5 s"):
        opened(web.url("pairs"))


def test_a_cache_smaller_than_a_shard_is_one_sentence(web):
    source = opened(web.url("pairs"), cache_gib=1e-6)
    with pytest.raises(PlaceError, match="no room; expected a larger cache than 1073 bytes"):
        source[0]


# Training


def test_training_batches_are_those_of_the_disk_from_a_cache_of_half_the_data(web, cache):
    shards = [web.folder / "pairs" / name for name in TARS]
    half = sum(path.stat().st_size for path in shards) / 2 / copies.GIB
    expected = batches_of(opened(web.folder / "pairs"))
    source = opened(web.url("pairs"), cache_gib=half)
    assert batches_of(source) == expected
    assert batches_of(source, first=2, steps=4) == expected[2:]
    assert len(fetched(web, *TARS)) > 4
    kept = sum(path.stat().st_size for path in (cache / "shards").iterdir())
    assert kept <= half * copies.GIB


@pytest.mark.parametrize("path", ["pairs", "pairs/{00000..00003}.tar"])
def test_shards_of_the_next_block_are_there_before_a_sample_of_theirs_is_read(web, cache, path):
    source = opened(web.url(path))
    shutil.rmtree(cache / "shards", ignore_errors=True)
    before = len(fetched(web, *TARS))
    orders = [SourceOrder("data", np.array(source.sizes), block=6)]
    transform = TrainingTransform(PreprocessConfig(), AugmentationConfig(), 16)
    examples = TrainingExamples([source], orders, transform, CaptionConfig(), seed=0)
    key = next(orders[0].read(0, 0, 0, 1))
    deadline = monotonic() + 20
    while len(fetched(web, *TARS)) < before + 4:
        examples.prefetch([key])
        assert monotonic() < deadline
        sleep(0.01)
    assert fields_of(source) == fields_of(opened(web.folder / path))
    assert len(fetched(web, *TARS)) == before + 4


def test_nothing_is_fetched_ahead_into_a_cache_without_room_for_it(web):
    source = opened(web.url("pairs"), cache_gib=2e4 / copies.GIB)
    source.prefetch(range(4))
    sleep(0.1)
    assert web.log("") == ["GET manifest.json - 200"]


def test_a_tenth_of_the_answers_being_that_a_server_is_busy_changes_nothing(web):
    web.restart(fail_every=10)
    assert batches_of(opened(web.url("pairs"))) == batches_of(opened(web.folder / "pairs"))
    assert any(line.endswith("503") for line in web.log(""))


def batches_of_rank(rank, path, cache):
    os.environ["VLM_CACHE"] = cache
    return batches_of(opened(path), rank=rank, world_size=2)


@pytest.mark.distributed
def test_two_ranks_of_a_node_fetch_each_file_once(web, cache):
    web.restart(seconds=0.05)
    halves = run_in_world(batches_of_rank, 2, web.url("pairs"), str(cache))
    found = [uids for step in zip(*halves, strict=True) for _, half in step for uids in half]
    expected = [uid for _, uids in batches_of(opened(web.folder / "pairs")) for uid in uids]
    assert found == expected
    assert fetched(web, *TARS, *INDEXES) == sorted([*TARS, *INDEXES])


@pytest.mark.slow
@pytest.mark.distributed
def test_workers_read_on_where_a_server_was_away_in_the_middle(web):
    expected = batches_of(opened(web.folder / "pairs"))
    web.restart(seconds=0.1)
    source = opened(web.url("pairs"))

    def go_and_come_back() -> None:
        while len(web.log("GET", ".tar")) < 3:
            sleep(0.005)
        web.kill()
        sleep(2)
        web.restart()

    thread = Thread(target=go_and_come_back)
    thread.start()
    found = batches_of(source, workers=2)
    thread.join()
    assert found == expected
