"""An embeddings folder keeps order and content, and is laid out as clip-retrieval reads it."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest

from tests.builders import encoded, make_image, make_samples, of_split
from vlm.embedding.embedder import Embedder
from vlm.embedding.parts import (
    ListedImage,
    SplitImages,
    images_in_folder,
    read_embeddings,
    write_embeddings,
)
from vlm.errors import ConfigError, DataError, SearchIndexError


@pytest.fixture(scope="module")
def written(tmp_path_factory, embedder, bundle, data_folder):
    out = tmp_path_factory.mktemp("embeddings") / "out"
    images = SplitImages(of_split(data_folder, "test"))
    write_embeddings(embedder, images, out, bundle=bundle, part_size=3)
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
    images = (ListedImage(f"p{n}", encoded(make_image(n)), "", {}) for n in range(12))
    write_embeddings(embedder, images, tmp_path / "out", bundle=bundle, part_size=1)
    assert (tmp_path / "out/img_emb/img_emb_11.npy").is_file()
    _, vectors, metadata = read_embeddings(tmp_path / "out")
    assert metadata["uid"].to_pylist() == [f"p{n}" for n in range(12)]
    expected = embedder.encode_image([make_image(n) for n in range(12)])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_images_of_a_folder_come_in_the_order_of_their_paths(tmp_path):
    names = ["b.png", "a/c.JPG", "a/b.webp", "z.jpeg", "notes.txt", "._b.png", ".old/a.png"]
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
        path.write_bytes(encoded(make_image(number), formats.get(path.suffix.lower(), "PNG")))
    found, left_out = images_in_folder(tmp_path)
    assert left_out == {"hidden": 2, "with another suffix": 1}
    assert [p.uid for p in found] == ["a/b.webp", "a/c.JPG", "b.png", "z.jpeg"]
    assert [p.address for p in found] == [str(tmp_path / p.uid) for p in found]
    assert [p.source for p in found] == [tmp_path / p.uid for p in found]
    assert all(p.captions == {} for p in found)


def test_images_of_a_split_carry_their_main_captions(data_folder):
    found = list(SplitImages(of_split(data_folder, "test")))
    assert [p.uid for p in found] == [sample.uid for sample in make_samples(24)]
    assert found[0].captions == {"en": "red apple", "zh": "红苹果"}
    assert found[0].address == f"{data_folder}/test-00000.tar.gz#0"
    assert found[7].address == f"{data_folder}/test-00001.tar.gz#2"


def test_what_cannot_be_used_of_a_table_is_left_out_and_named(tmp_path, embedder):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(make_image(number)))
    path = tmp_path / "caps.csv"
    path.write_text("image,en\n0.png,a cat\n1.png,\n2.png,a dog\n")
    images = SplitImages(of_split(path, "train"))
    out = tmp_path / "out"
    written = write_embeddings(embedder, images, out, bundle=out)
    assert written.description.count == len(images) - 1 == 2
    (reason,) = written.unreadable.values()
    assert reason.startswith(f"{path}, line 3: found no caption")
    assert read_embeddings(out)[2]["caption_en"].to_pylist() == ["a cat", "a dog"]


@pytest.mark.parametrize("there", [True, False], ids=["no image", "no folder"])
def test_a_folder_without_images_is_named(tmp_path, there):
    folder = tmp_path if there else tmp_path / "gone"
    with pytest.raises(DataError, match=rf"{folder} (holds no image|is not a folder)"):
        images_in_folder(folder)


def test_a_folder_that_exists_is_not_written_over(tmp_path, embedder, bundle):
    with pytest.raises(DataError, match=f"{tmp_path} exists already"):
        write_embeddings(embedder, iter([]), tmp_path, bundle=bundle)


@pytest.fixture
def folder_of_images(tmp_path):
    """Twelve images, of which 2.png is damaged and 7.png is a link to nothing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes(encoded(make_image(number)))
    (folder / "02.png").write_bytes(b"no image")
    (folder / "07.png").unlink()
    (folder / "07.png").symlink_to("nowhere")
    return folder


def embed(embedder, folder, out, **options):
    images, _ = images_in_folder(folder)
    options = {"bundle": out, "part_size": 4, "allowed_share": 0.2} | options
    return write_embeddings(embedder, images, out, **options)


@pytest.mark.parametrize("share", [-0.1, 5.0])
def test_an_allowed_share_that_is_no_ratio_is_refused(folder_of_images, embedder, tmp_path, share):
    with pytest.raises(ConfigError, match=rf"allowed_share is {share}; expected a ratio in"):
        embed(embedder, folder_of_images, tmp_path / "out", allowed_share=share)


def test_unreadable_images_are_left_out_and_named(folder_of_images, embedder, tmp_path):
    written = embed(embedder, folder_of_images, tmp_path / "out")
    assert written.description.count == 10
    assert [path.rsplit("/", 1)[1] for path in written.unreadable] == ["02.png", "nowhere"]
    damaged, gone = written.unreadable.values()
    assert "02.png is not one of" in damaged
    assert "07.png cannot be read: No such file" in gone
    _, vectors, metadata = read_embeddings(tmp_path / "out")
    kept = [number for number in range(12) if number not in (2, 7)]
    assert metadata["uid"].to_pylist() == [f"{number:02d}.png" for number in kept]
    expected = embedder.encode_image([make_image(number) for number in kept])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_too_many_unreadable_images_end_it_but_not_the_work(
    folder_of_images, embedder, tmp_path, counted
):
    out = tmp_path / "out"
    said = r"2 of 12 .* allowed_share 0\.01 permits \(1\): .*02\.png .*; .*07\.png .* kept in .*out"
    with pytest.raises(DataError, match=said):
        embed(embedder, folder_of_images, out, allowed_share=0.01)
    with pytest.raises(SearchIndexError, match=r"is not finished; expected `vlm embed`"):
        read_embeddings(out)
    assert counted() == 10
    (folder_of_images / "02.png").write_bytes(encoded(make_image(2)))
    assert embed(embedder, folder_of_images, out, allowed_share=0.01).description.count == 11
    assert counted() == 4  # the part of the image that was mended


def test_one_unreadable_image_of_few_is_left_out_unless_none_may_be(
    folder_of_images, embedder, tmp_path
):
    (folder_of_images / "07.png").unlink()
    with pytest.raises(DataError, match=r"1 of 11 images cannot be read, .* permits \(0\)"):
        embed(embedder, folder_of_images, tmp_path / "none", allowed_share=0.0)
    written = embed(embedder, folder_of_images, tmp_path / "out", allowed_share=0.01)
    assert (written.description.count, len(written.unreadable)) == (10, 1)


@pytest.fixture
def counted(embedder, monkeypatch):
    """Return how many images were embedded since the last call."""
    count, encode = [0], embedder.encode_pixels

    def counting(pixels):
        count[0] += len(pixels)
        return encode(pixels)

    monkeypatch.setattr(embedder, "encode_pixels", counting)

    def since():
        found, count[0] = count[0], 0
        return found

    return since


def test_a_run_that_was_ended_goes_on_with_what_is_missing(
    folder_of_images, embedder, tmp_path, counted
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    embed(embedder, folder_of_images, whole)
    assert counted() == 10
    shutil.copytree(whole, out)
    (out / "embeddings.json").unlink()
    (out / "metadata/metadata_1.parquet").unlink()  # it was ended between the two files
    (out / "img_emb/img_emb_2.npy").unlink()
    np.save(out / "img_emb/img_emb_3.npy", np.zeros((4, 32), np.float32))  # of another run
    assert embed(embedder, folder_of_images, out).description.count == 10
    assert counted() == 7
    for name in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        if name.name != "embeddings.json":
            assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / "img_emb/img_emb_3.npy").exists()


def test_parts_of_another_model_are_made_anew(folder_of_images, embedder, tmp_path, counted):
    out = tmp_path / "out"
    embed(embedder, folder_of_images, out)
    (out / "embeddings.json").unlink()
    counted()
    other = Embedder(replace(embedder.bundle, fingerprint="of other weights"))
    other.encode_pixels = embedder.encode_pixels
    assert embed(other, folder_of_images, out).description.fingerprint == "of other weights"
    assert counted() == 10


def test_names_that_are_not_utf8_are_escaped(embedder, tmp_path):
    (tmp_path / "images").mkdir()
    name = os.fsencode(tmp_path / "images") + b"/" + "红色.png".encode("gbk")
    with open(name, "wb") as file:
        file.write(encoded(make_image(0)))
    embed(embedder, tmp_path / "images", tmp_path / "out")
    _, _, metadata = read_embeddings(tmp_path / "out")
    assert metadata["uid"].to_pylist() == [r"\xba\xec" + "ɫ.png"]


def test_vectors_that_are_not_finite_are_refused(copy):
    path = copy / "img_emb/img_emb_3.npy"
    vectors = np.load(path)
    vectors[1] = np.nan
    np.save(path, vectors)
    with pytest.raises(SearchIndexError, match=r"1 of the 24 vectors in .* are not finite"):
        read_embeddings(copy)


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
