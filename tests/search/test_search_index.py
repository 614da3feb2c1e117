"""An index finds what its model embedded, wherever the run lies, and for that model only."""

import json
import shutil
from dataclasses import asdict

import faiss
import numpy as np
import pyarrow.parquet
import pytest

from tests.builders import encoded, make_image, make_sample, make_samples, of_split, tiny_bundle
from vlm.bundle import load_bundle
from vlm.embedding.embedder import Embedder
from vlm.embedding.parts import SplitImages, images_in_folder, write_embeddings
from vlm.errors import DataError, SearchIndexError
from vlm.search.search_index import SearchIndex, build_search_index


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, data_folder):
    """Return a run with its bundle, the embeddings of a split and their index."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    bundle = tiny_bundle(folder / "bundle", context_length=32)
    images = SplitImages(of_split(data_folder, "test"))
    write_embeddings(
        Embedder.load(bundle, device="cpu"), images, folder / "embeddings", bundle=bundle,
        part_size=7,
    )  # fmt: skip
    assert len(build_search_index(folder / "embeddings", folder / "index")) == 24
    return folder


@pytest.fixture
def copy(run_folder, tmp_path):
    return shutil.copytree(run_folder / "index", tmp_path / "index")


def change_description(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_text_finds_the_images_with_the_highest_cosines(run_folder, embedder):
    index = SearchIndex.open(run_folder / "index")
    images = embedder.encode_image([sample.image for sample in make_samples(24)])
    for text in ("grey cat", "圆圆的月亮"):
        query = embedder.encode_text([text])
        cosines = (images @ query[0]).tolist()
        hits = index.search(query, 6)
        assert [hit.rank for hit in hits] == [1, 2, 3, 4, 5, 6]
        expected = np.sort(cosines)[::-1][:6]
        np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-5)
        found = [cosines[int(hit.uid.removeprefix("sample-"))] for hit in hits]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("number", [0, 8, 23])
def test_an_image_finds_itself_with_its_captions(run_folder, embedder, number):
    sample = make_sample(number)
    hit = SearchIndex.open(run_folder / "index").search(embedder.encode_image([sample.image]), 1)[0]
    assert hit.uid == sample.uid
    assert hit.score == pytest.approx(1, abs=1e-5)
    assert hit.captions == {language: texts[0] for language, texts in sample.captions.items()}
    assert hit.path.endswith(f"/test-0000{number // 5}.tar.gz#{number % 5}")


def test_more_hits_than_images_give_all_images(run_folder, embedder):
    hits = SearchIndex.open(run_folder / "index").search(embedder.encode_text(["cat"]), 100)
    assert len(hits) == len({hit.uid for hit in hits}) == 24


def test_images_of_a_folder_are_found_by_their_path_without_captions(tmp_path, embedder, bundle):
    (tmp_path / "images").mkdir()
    for number in range(5):
        (tmp_path / f"images/{number}.png").write_bytes(encoded(make_image(number)))
    images, _ = images_in_folder(tmp_path / "images")
    write_embeddings(embedder, images, tmp_path / "embeddings", bundle=bundle)
    build_search_index(tmp_path / "embeddings", tmp_path / "index")
    query = embedder.encode_image([make_image(3)])
    hit = SearchIndex.open(tmp_path / "index").search(query, 1)[0]
    assert (hit.uid, hit.path) == ("3.png", str(tmp_path / "images/3.png"))
    assert hit.captions == {}


def test_hits_become_plain_records(run_folder, embedder):
    index = SearchIndex.open(run_folder / "index")
    hits = index.search(embedder.encode_image([make_image(1)]), 2)
    read = json.loads(json.dumps([asdict(hit) for hit in hits]))
    assert [record["rank"] for record in read] == [1, 2]
    assert set(read[0]) == {"rank", "score", "uid", "path", "captions"}
    assert read[0]["captions"] == {"en": "grey cat", "zh": "灰色的猫"}


def test_an_index_finds_its_bundle(run_folder):
    index = SearchIndex.open(run_folder / "index")
    assert index.load_embedder(device="cpu").fingerprint == index.fingerprint


def test_a_moved_run_still_finds_its_bundle(run_folder, tmp_path):
    moved = shutil.copytree(run_folder, tmp_path / "else" / "where")
    index = SearchIndex.open(moved / "index")
    assert index.bundle.resolve() == (moved / "bundle").resolve()
    index.load_embedder(device="cpu")


def test_an_index_that_was_copied_away_from_its_model_asks_for_it(run_folder, copy):
    index = SearchIndex.open(copy)
    with pytest.raises(SearchIndexError, match=r"which is not there; expected .* --bundle"):
        index.load_embedder(device="cpu")
    assert index.load_embedder(run_folder / "bundle", device="cpu").embed_dim == 32


def test_another_model_is_refused_with_both_fingerprints(run_folder, tmp_path):
    index = SearchIndex.open(run_folder / "index")
    other = tiny_bundle(tmp_path / "other", seed=1, context_length=32)
    found = load_bundle(other).fingerprint
    said = rf"another model \({index.fingerprint[:12]}\) .* \({found[:12]}\)"
    with pytest.raises(SearchIndexError, match=said):
        index.load_embedder(other, device="cpu")


@pytest.mark.parametrize("name", ["image.index", "metadata.parquet"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8], ids=str)
def test_one_changed_byte_is_refused_by_the_files_name(copy, name, share):
    content = bytearray((copy / name).read_bytes())
    content[int(len(content) * share)] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(SearchIndexError, match=f"{copy / name} is damaged: sha256"):
        SearchIndex.open(copy)


@pytest.mark.parametrize("name", ["image.index", "metadata.parquet", "index.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(SearchIndexError, match=name):
        SearchIndex.open(copy)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"sha256": {}}'], ids=["empty", "a list", "no fields", "few fields"]
)
def test_a_bad_description_is_refused(copy, text):
    (copy / "index.json").write_text(text)
    with pytest.raises(SearchIndexError, match=f"the index {copy} cannot be read"):
        SearchIndex.open(copy)


def test_a_folder_that_exists_is_not_written_over(run_folder, copy):
    with pytest.raises(DataError, match=f"{copy} exists already"):
        build_search_index(run_folder / "embeddings", copy)


def test_a_folder_without_embeddings_is_named_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(SearchIndexError, match=f"{tmp_path} holds no embeddings"):
        build_search_index(tmp_path, tmp_path / "index")
    assert list(tmp_path.iterdir()) == []


def test_the_index_is_readable_by_faiss_and_pyarrow_themselves(run_folder):
    assert faiss.read_index(str(run_folder / "index/image.index")).ntotal == 24
    table = pyarrow.parquet.read_table(run_folder / "index/metadata.parquet")
    assert table["uid"].to_pylist() == [sample.uid for sample in make_samples(24)]


def test_a_model_path_outside_the_run_is_kept(run_folder, copy):
    change_description(copy, bundle=str(run_folder / "bundle"))
    assert SearchIndex.open(copy).bundle == run_folder / "bundle"


def test_an_approximate_index_is_tuned_and_searched_like_an_exact_one(
    run_folder, embedder, tmp_path
):
    built = build_search_index(run_folder / "embeddings", tmp_path / "index", factory="IVF2,Flat")
    assert set(built.parameters) == {"nprobe"}
    query = embedder.encode_image([make_sample(8).image])
    assert SearchIndex.open(tmp_path / "index").search(query, 1)[0].uid == "sample-0008"
    auto = build_search_index(run_folder / "embeddings", tmp_path / "auto", factory="auto")
    assert auto.factory == "Flat"


def test_hits_that_an_approximate_index_lacks_are_left_out(run_folder, embedder, tmp_path):
    build_search_index(run_folder / "embeddings", tmp_path / "index", factory="IVF8,Flat@nprobe=1")
    hits = SearchIndex.open(tmp_path / "index").search(embedder.encode_text(["cat"]), 24)
    assert 0 < len(hits) < 24
    assert len({hit.uid for hit in hits}) == len(hits)
