"""An embeddings folder keeps order and content, and is laid out as clip-retrieval reads it."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest

from tests.builders import encoded, make_image, make_samples
from vlm.embedding.parts import (
    Image,
    images_in_folder,
    images_in_split,
    read_embeddings,
    write_embeddings,
)
from vlm.errors import DataError, SearchIndexError


@pytest.fixture(scope="module")
def written(tmp_path_factory, embedder, bundle, data_folder):
    out = tmp_path_factory.mktemp("embeddings") / "out"
    write_embeddings(
        embedder, images_in_split(data_folder, "test"), out, bundle=bundle, part_size=3
    )
    return out


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_the_order_of_images_is_kept_across_parts(written, embedder):
    description, vectors, metadata = read_embeddings(written)
    samples = make_samples(24)
    expected = embedder.encode_image([sample.image for sample in samples])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert metadata["uid"].to_pylist() == [sample.uid for sample in samples]
    for language in ("zh", "en"):
        captions = [sample.captions[language][0] for sample in samples]
        assert metadata[f"caption_{language}"].to_pylist() == captions
    assert (description.count, description.dim) == (24, 32)


def test_parts_lie_where_clip_retrieval_looks_for_them(written):
    for part in range(8):
        vectors = np.load(written / "img_emb" / f"img_emb_{part}.npy")
        table = pyarrow.parquet.read_table(written / "metadata" / f"metadata_{part}.parquet")
        assert vectors.shape == (3, 32)
        assert vectors.dtype == np.float32
        assert table.num_rows == 3
        assert table.column_names == ["uid", "image_path", "caption_zh", "caption_en"]
    assert len(list((written / "img_emb").iterdir())) == 8
    assert len(list((written / "metadata").iterdir())) == 8


def test_the_description_names_the_model(written, embedder, bundle):
    record = json.loads((written / "embeddings.json").read_text())
    assert record == {
        "bundle": str(bundle), "fingerprint": embedder.fingerprint, "count": 24, "dim": 32,
    }  # fmt: skip


def test_more_than_ten_parts_come_back_in_the_order_of_their_numbers(tmp_path, embedder, bundle):
    images = (Image(f"p{n}", encoded(make_image(n)), "", {}) for n in range(12))
    write_embeddings(embedder, images, tmp_path / "out", bundle=bundle, part_size=1)
    assert (tmp_path / "out/img_emb/img_emb_11.npy").is_file()
    _, vectors, metadata = read_embeddings(tmp_path / "out")
    assert metadata["uid"].to_pylist() == [f"p{n}" for n in range(12)]
    expected = embedder.encode_image([make_image(n) for n in range(12)])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_images_of_a_folder_come_in_the_order_of_their_paths(tmp_path):
    for number, name in enumerate(["b.png", "a/c.JPG", "a/b.webp", "z.jpeg", "notes.txt"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
        path.write_bytes(encoded(make_image(number), formats.get(path.suffix.lower(), "PNG")))
    found = list(images_in_folder(tmp_path))
    assert [p.uid for p in found] == ["a/b.webp", "a/c.JPG", "b.png", "z.jpeg"]
    assert [p.path for p in found] == [str(tmp_path / p.uid) for p in found]
    assert [p.source for p in found] == [tmp_path / p.uid for p in found]
    assert all(p.captions == {} for p in found)


def test_images_of_a_split_carry_their_main_captions(data_folder):
    found = list(images_in_split(data_folder, "test"))
    assert [p.uid for p in found] == [sample.uid for sample in make_samples(24)]
    assert found[0].captions == {"en": "red apple", "zh": "红苹果"}
    assert {p.path for p in found} == {""}


@pytest.mark.parametrize("there", [True, False], ids=["no image", "no folder"])
def test_a_folder_without_images_is_named(tmp_path, there):
    folder = tmp_path if there else tmp_path / "gone"
    with pytest.raises(DataError, match=rf"{folder} (holds no image|is not a folder)"):
        list(images_in_folder(folder))


def test_a_folder_that_exists_is_not_written_over(tmp_path, embedder, bundle):
    with pytest.raises(DataError, match=f"{tmp_path} exists already"):
        write_embeddings(embedder, iter([]), tmp_path, bundle=bundle)


def test_a_damaged_image_is_named_and_leaves_nothing_behind(tmp_path, embedder, bundle):
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(encoded(make_image(number)))
    (tmp_path / "images/2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"images/2\.png is not one of"):
        write_embeddings(
            embedder, images_in_folder(tmp_path / "images"), tmp_path / "out", bundle=bundle,
            part_size=1,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.json", "img_emb/img_emb_3.npy", "metadata/metadata_3.parquet", "img_emb/",
        "metadata/",
    ],
)  # fmt: skip
def test_a_missing_part_is_refused(copy, name):
    if name.endswith("/"):
        shutil.rmtree(copy / name)
    else:
        (copy / name).unlink()
    with pytest.raises(SearchIndexError, match=str(copy)):
        read_embeddings(copy)


@pytest.mark.parametrize("name", ["img_emb/img_emb_3.npy", "metadata/metadata_3.parquet"])
@pytest.mark.parametrize("length", [3, 60, 200, 400])
def test_a_part_cut_short_is_refused(copy, name, length):
    (copy / name).write_bytes((copy / name).read_bytes()[:length])
    with pytest.raises(SearchIndexError, match=f"the embeddings in {copy} cannot be read"):
        read_embeddings(copy)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"count": 24}', b"\xff"],
    ids=["empty", "a list", "no fields", "few fields", "not UTF-8"],
)  # fmt: skip
def test_a_bad_description_is_refused(copy, text):
    (copy / "embeddings.json").write_bytes(text)
    with pytest.raises(SearchIndexError, match=f"the embeddings in {copy} cannot be read"):
        read_embeddings(copy)


def test_vectors_that_would_be_unpickled_are_refused(copy):
    np.save(copy / "img_emb/img_emb_3.npy", np.array([{"a": 1}] * 3), allow_pickle=True)
    with pytest.raises(SearchIndexError, match="allow_pickle=False"):
        read_embeddings(copy)


def test_vectors_that_do_not_match_the_description_are_refused_with_both_shapes(copy):
    np.save(copy / "img_emb/img_emb_3.npy", np.zeros((2, 32), np.float32))
    with pytest.raises(SearchIndexError, match=r"\(23, 32\) and 24 rows .* shape \(24, 32\)"):
        read_embeddings(copy)
