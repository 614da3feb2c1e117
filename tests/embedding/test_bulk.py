"""Vectors of many images and texts are those of the embedder, however they were come by."""

import io
import json
import multiprocessing
import shutil
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.builders import THINGS, encoded, make_image, tiny_tokenizer
from tests.support.processes import run_in_processes
from vlm.distributed.groups import world_group
from vlm.embedding import bulk
from vlm.embedding.bulk import BulkEmbedder, digest_of_image
from vlm.embedding.embedder import Embedder
from vlm.errors import DataError, DistributedError, VlmError

IMAGES = [encoded(make_image(number)) for number in range(11)]
TEXTS = [text for pair in THINGS for text in pair]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(bulk, "IMAGES_A_PART", 4)
    monkeypatch.setattr(bulk, "TEXTS_A_PART", 10)


class CountingEmbedder(Embedder):
    """Remembers how many images and texts it was given at a time."""

    def encode_image(self, images, **options):
        self.images = [*getattr(self, "images", []), len(images)]
        return super().encode_image(images, **options)

    def encode_text(self, texts, **options):
        self.texts = [*getattr(self, "texts", []), len(texts)]
        return super().encode_text(texts, **options)

    @property
    def encoded(self):
        return sum(getattr(self, "images", [])), sum(getattr(self, "texts", []))


@pytest.fixture
def counting(bundle):
    return CountingEmbedder.load(bundle, device="cpu")


def in_parts(encode, items, size):
    return np.concatenate([encode(items[k : k + size]) for k in range(0, len(items), size)])


def files_in(cache):
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}


@pytest.mark.parametrize("cached", [False, True])
def test_vectors_are_the_embedders_in_input_order(embedder, tmp_path, cached):
    bulk = BulkEmbedder(embedder, cache=tmp_path if cached else None)
    for found, encode, items, size in (
        (bulk.encode_image(IMAGES), embedder.encode_image, IMAGES, 4),
        (bulk.encode_text(TEXTS), embedder.encode_text, TEXTS, 10),
    ):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, in_parts(encode, items, size))
        np.testing.assert_allclose(found, encode(items), atol=1e-6)
    assert bulk.encode_image([]).shape == bulk.encode_text([]).shape == (0, 32)
    assert len(files_in(tmp_path)) == cached * 6


def test_what_was_embedded_once_is_not_embedded_again(counting, tmp_path):
    first = BulkEmbedder(counting, cache=tmp_path)
    images, texts = first.encode_image(IMAGES), first.encode_text(TEXTS)
    assert counting.encoded == (11, 24)
    files = files_in(tmp_path)
    again = BulkEmbedder(counting, cache=tmp_path)
    np.testing.assert_array_equal(again.encode_image(IMAGES), images)
    np.testing.assert_array_equal(again.encode_text(TEXTS), texts)
    assert counting.encoded == (11, 24)
    assert files_in(tmp_path) == files


def test_images_are_known_by_their_bytes_wherever_they_lie(counting, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(11)]
    for path, content in zip(paths, IMAGES, strict=True):
        path.write_bytes(content)
    bulk = BulkEmbedder(counting, cache=tmp_path / "cache")
    vectors = bulk.encode_image(IMAGES)
    np.testing.assert_array_equal(bulk.encode_image(paths), vectors)
    assert counting.encoded == (11, 0)
    paths[5].write_bytes(encoded(make_image(99)))
    changed = bulk.encode_image(paths)
    assert counting.encoded == (15, 0)
    np.testing.assert_array_equal(changed[[0, 4, 8]], vectors[[0, 4, 8]])
    assert not np.allclose(changed[5], vectors[5], atol=1e-3)


def test_another_order_or_another_division_is_another_part(counting, tmp_path):
    bulk = BulkEmbedder(counting, cache=tmp_path)
    vectors = bulk.encode_text(TEXTS)
    np.testing.assert_allclose(bulk.encode_text(TEXTS[::-1]), vectors[::-1], atol=1e-6)
    assert counting.encoded == (0, 48)
    joined = ["ab", "c"], ["a", "bc"], ["abc"]
    kept = [bulk.encode_text(texts) for texts in joined]
    for texts, found in zip(joined, kept, strict=True):
        np.testing.assert_array_equal(found, counting.encode_text(texts))


def with_other_size(bundle):
    return replace(bundle, preprocess_cfg={**bundle.preprocess_cfg, "size": 8})


@pytest.mark.parametrize(
    ("change", "encoded_again"),
    [
        (lambda it: setattr(it, "fingerprint", "of other weights"), (11, 24)),
        (lambda it: setattr(it, "bundle", with_other_size(it.bundle)), (11, 0)),
        (lambda it: setattr(it, "tokenizer", tiny_tokenizer(context_length=31)), (0, 24)),
    ],
    ids=["weights", "transform", "tokenizer"],
)
def test_vectors_of_another_model_are_not_taken(counting, bundle, tmp_path, change, encoded_again):
    first = BulkEmbedder(counting, cache=tmp_path)
    first.encode_image(IMAGES), first.encode_text(TEXTS)
    other = CountingEmbedder.load(bundle, device="cpu")
    change(other)
    second = BulkEmbedder(other, cache=tmp_path)
    second.encode_image(IMAGES), second.encode_text(TEXTS)
    assert other.encoded == encoded_again


def test_bundles_with_equal_weights_and_other_heads_share_no_vectors(counting, bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    config = copy / "open_clip_config.json"
    record = json.loads(config.read_text())
    record["model_cfg"]["text_cfg"]["heads"] *= 2
    config.write_text(json.dumps(record))
    other = CountingEmbedder.load(copy, device="cpu")
    first = BulkEmbedder(counting, cache=tmp_path / "cache").encode_text(TEXTS)
    second = BulkEmbedder(other, cache=tmp_path / "cache").encode_text(TEXTS)
    assert other.encoded == (0, 24)
    assert not np.allclose(first, second, atol=1e-3)
    moved = CountingEmbedder.load(shutil.move(copy, tmp_path / "moved"), device="cpu")
    found = BulkEmbedder(moved, cache=tmp_path / "cache").encode_text(TEXTS)
    np.testing.assert_array_equal(found, second)
    assert moved.encoded == (0, 0)


def test_vectors_of_another_width_are_not_taken(counting, tmp_path):
    wide = Embedder(replace(counting.bundle, truncate_dims=(16,)))
    BulkEmbedder(wide, cache=tmp_path).encode_text(TEXTS)
    narrow = wide.truncated(16)
    found = BulkEmbedder(narrow, cache=tmp_path).encode_text(TEXTS)
    np.testing.assert_array_equal(found, in_parts(narrow.encode_text, TEXTS, 10))


def array_file(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: b"PK\x03\x04" + content,
        lambda content: array_file(np.zeros((4, 31), np.float32)),
        lambda content: array_file(np.zeros((3, 32), np.float32)),
        lambda content: array_file(np.zeros((4, 32), np.float64)),
        lambda content: array_file(np.array([{}], dtype=object)),
        lambda content: content.replace(b"(4, 32)", b"(4, 9" + b"9" * 9 + b")"),
    ],
    ids=["empty", "cut", "header cut", "zip", "width", "rows", "double", "objects", "huge"],
)
def test_a_file_that_is_no_such_array_is_made_anew(counting, tmp_path, damage):
    bulk = BulkEmbedder(counting, cache=tmp_path)
    vectors = bulk.encode_image(IMAGES[:8])
    victim = sorted(files_in(tmp_path))[0]
    content = victim.read_bytes()
    victim.write_bytes(damage(content))
    np.testing.assert_array_equal(bulk.encode_image(IMAGES[:8]), vectors)
    assert counting.encoded == (12, 0)
    assert victim.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_named(embedder, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(VlmError, match=r"cannot write .*cache"):
        BulkEmbedder(embedder, cache=tmp_path / "cache").encode_text(TEXTS)


def test_an_embedder_without_names_for_its_vectors_keeps_none(embedder, tmp_path):
    by_hand = Embedder(replace(embedder.bundle, fingerprint=""))
    with pytest.raises(VlmError, match="expected one that was read from a bundle"):
        BulkEmbedder(by_hand, cache=tmp_path)
    found = BulkEmbedder(by_hand).encode_text(TEXTS)
    np.testing.assert_array_equal(found, in_parts(embedder.encode_text, TEXTS, 10))


class ReadImages(list):
    """Counts how often images are taken out of it."""

    reads = 0

    def __getitem__(self, index):
        if isinstance(index, slice):  # checks of types take single ones
            self.reads += len(range(*index.indices(len(self))))
        return super().__getitem__(index)


def test_images_are_read_no_more_often_than_needed(embedder, tmp_path):
    images = ReadImages(IMAGES)
    BulkEmbedder(embedder).encode_image(images)
    assert images.reads == 11
    bulk = BulkEmbedder(embedder, cache=tmp_path)
    digests = bulk.digests_of(images)
    assert images.reads == 22
    bulk.encode_image(images, digests)
    assert images.reads == 33
    bulk.encode_image(images, digests)
    assert images.reads == 33


def test_digests_are_those_of_each_image(embedder, tmp_path):
    path = tmp_path / "0.png"
    path.write_bytes(IMAGES[0])
    sources = [path, *IMAGES, make_image(0)]
    digests = BulkEmbedder(embedder).digests_of(sources)
    assert digests == [digest_of_image(source) for source in sources]
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(sources) - 1
    with pytest.raises(VlmError, match="found 2 digests of 11 images"):
        BulkEmbedder(embedder).encode_image(IMAGES, digests[:2])


def with_palette(colour):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *colour])
    return image


def test_opened_images_are_known_by_what_is_seen():
    red, green = with_palette((255, 0, 0)), with_palette((0, 255, 0))
    assert red.tobytes() == green.tobytes()
    assert digest_of_image(red) != digest_of_image(green)
    assert digest_of_image(red) == digest_of_image(Image.new("RGB", (8, 8), (255, 0, 0)))
    green.info["transparency"] = 1
    assert digest_of_image(green) == digest_of_image(Image.new("RGB", (8, 8), "white"))
    turned = Image.open(io.BytesIO(encoded(make_image(1, size=(20, 10)))))
    upright = digest_of_image(turned)
    turned.getexif()[0x0112] = 6  # lies on its side
    assert digest_of_image(turned) != upright
    assert digest_of_image(turned) == digest_of_image(
        make_image(1, size=(20, 10)).rotate(-90, expand=True)
    )


def test_vectors_are_held_once_while_they_are_made(embedder, monkeypatch):
    monkeypatch.setattr(bulk, "TEXTS_A_PART", 2000)
    monkeypatch.setattr(
        embedder, "encode_text", lambda texts: np.ones((len(texts), embedder.embed_dim), np.float32)
    )
    texts = ["cat"] * 100_000
    tracemalloc.start()
    try:
        found = BulkEmbedder(embedder).encode_text(texts)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.nbytes == 100_000 * 32 * 4
    assert peak < 1.3 * found.nbytes


def test_a_damaged_image_without_a_path_is_told_by_its_number(embedder, small_parts):
    images = [encoded(make_image(number)) for number in range(7)]
    images[5] = images[5][:60]
    with pytest.raises(DataError, match=r"^image 6 is damaged"):
        BulkEmbedder(embedder).encode_image(images)
    with pytest.raises(DataError, match=r"^image 6 is damaged"):
        embedder.encode_image(images, batch_size=2)


def test_a_missing_image_is_named(embedder, tmp_path):
    bulk = BulkEmbedder(embedder, cache=tmp_path)
    with pytest.raises(DataError, match=r"gone\.png cannot be read"):
        bulk.digests_of([IMAGES[0], tmp_path / "gone.png"])


@pytest.mark.parametrize("texts", ["cat", ["cat", 3]], ids=["a string", "a number"])
def test_what_is_no_list_of_strings_is_refused_as_by_the_embedder(embedder, tmp_path, texts):
    # Under jaxtyping's checks the annotation may answer first, but not for a lone string.
    error = VlmError if isinstance(texts, str) else (VlmError, TypeError)
    for cache in (None, tmp_path):
        with pytest.raises(error, match=r"a list of strings|checking the parameters of"):
            BulkEmbedder(embedder, cache=cache).encode_text(texts)
    assert not files_in(tmp_path)


def test_progress_says_what_came_from_the_cache(embedder, tmp_path, capsys):
    BulkEmbedder(embedder, cache=tmp_path).encode_image(IMAGES)
    assert capsys.readouterr() == ("", "")
    bulk = BulkEmbedder(embedder, cache=tmp_path, show_progress_bar=True)
    bulk.encode_image([*IMAGES[:8], IMAGES[0]])
    out, err = capsys.readouterr()
    assert out == ""
    assert "embedding images" in err
    assert "9/9" in err
    assert "8 from the cache" in err


def _small_parts():
    bulk.IMAGES_A_PART, bulk.TEXTS_A_PART = 4, 10


def _embed_over_ranks(rank, bundle, cache, count):
    _small_parts()
    embedder = CountingEmbedder.load(bundle, device="cpu")
    bulk = BulkEmbedder(embedder, cache=cache, group=world_group(), show_progress_bar=True)
    images, texts = bulk.encode_image(IMAGES[:count]), bulk.encode_text(TEXTS)
    return [*map(torch.from_numpy, (images, texts)), embedder.encoded, bulk.show_progress_bar]


@pytest.mark.distributed
@pytest.mark.parametrize("count", [0, 3, 11])
def test_two_ranks_share_the_work_and_both_get_the_vectors_of_one(
    embedder, bundle, tmp_path, count
):
    cache = tmp_path if count == 11 else None
    expected = BulkEmbedder(embedder)
    images, texts = expected.encode_image(IMAGES[:count]), expected.encode_text(TEXTS)
    results = run_in_processes(_embed_over_ranks, 2, bundle, cache, count)
    for found_images, found_texts, _, _ in results:
        np.testing.assert_array_equal(found_images.numpy(), images)
        np.testing.assert_array_equal(found_texts.numpy(), texts)
    shares = {0: [(0, 14), (0, 10)], 3: [(3, 14), (0, 10)], 11: [(7, 14), (4, 10)]}
    assert [encoded for _, _, encoded, _ in results] == shares[count]
    assert [shows for *_, shows in results] == [True, False]
    if cache:
        again = CountingEmbedder.load(bundle, device="cpu")
        found = BulkEmbedder(again, cache=cache).encode_image(IMAGES)
        np.testing.assert_array_equal(found, images)
        assert again.encoded == (0, 0)


def _errors_over_ranks(rank, bundle, folder):
    _small_parts()
    embedder = Embedder.load(bundle, device="cpu")
    gone = [*IMAGES[:5], folder / "gone.png", *IMAGES[6:], b"no image"]
    bulk = BulkEmbedder(embedder, group=world_group())
    own = folder / f"cache {rank}"  # that of rank 1 is a file
    unwritable = BulkEmbedder(embedder, group=world_group(), cache=own)
    messages = []
    for work in (
        lambda: bulk.encode_image(gone),
        lambda: bulk.digests_of(gone),
        lambda: unwritable.encode_text(TEXTS),
    ):
        try:
            work()
        except VlmError as error:
            messages.append(f"{type(error).__name__}: {error}")
    after = bulk.encode_image(IMAGES)  # ranks still understand each other
    return [messages, torch.from_numpy(after)]


@pytest.mark.distributed
def test_what_one_rank_cannot_do_is_said_by_all(embedder, bundle, tmp_path):
    (tmp_path / "cache 1").write_text("not a folder")
    (first, after), (second, _) = run_in_processes(_errors_over_ranks, 2, bundle, tmp_path)
    gone = f"DataError: {tmp_path / 'gone.png'} cannot be read: No such file or directory"
    assert first[:2] == second[:2] == [gone, gone]
    assert first[2].split(": ", 1)[1] == second[2].split(": ", 1)[1]
    assert "cannot write" in second[2]
    np.testing.assert_array_equal(after.numpy(), BulkEmbedder(embedder).encode_image(IMAGES))


class FailingEmbedder(Embedder):
    """Meets an error at the word of it."""

    def encode_text(self, texts, **options):
        if "memory" in texts:
            raise MemoryError
        if "GPU" in texts:
            raise torch.OutOfMemoryError("GPU memory is full.\n  Free some.")
        if "disk" in texts:
            raise OSError(5, "Input/output error")
        return super().encode_text(texts, **options)


def _failures_over_ranks(rank, bundle):
    _small_parts()
    embedder = FailingEmbedder.load(bundle, device="cpu")
    bulk = BulkEmbedder(embedder, group=world_group())
    met = []
    for first, second in (("cat", "memory"), ("cat", "GPU"), ("disk", "cat"), ("disk", "memory")):
        try:
            bulk.encode_text([first] * 10 + [second] * 10)
        except Exception as error:
            met.append(f"{type(error).__name__}: {error}")
    return [met, torch.from_numpy(bulk.encode_text(TEXTS))]


@pytest.mark.distributed
def test_an_error_of_any_kind_is_its_own_on_the_rank_that_met_it_and_told_to_the_others(
    embedder, bundle
):
    (first, after), (second, _) = run_in_processes(_failures_over_ranks, 2, bundle)
    said, disk = DistributedError.__name__, "OSError: [Errno 5] Input/output error"
    assert first == [
        f"{said}: rank 1 met MemoryError",
        f"{said}: rank 1 met OutOfMemoryError: GPU memory is full. Free some.",
        disk,
        disk,
    ]
    assert second == [
        "MemoryError: ",
        "OutOfMemoryError: GPU memory is full.\n  Free some.",
        f"{said}: rank 0 met {disk}",
        "MemoryError: ",
    ]
    np.testing.assert_array_equal(after.numpy(), BulkEmbedder(embedder).encode_text(TEXTS))


def many_images():
    return [encoded(make_image(number)) for number in range(120)]


def _embed_slowly(bundle, cache):
    torch.set_num_threads(1)
    _small_parts()
    embedder = Embedder.load(bundle, device="cpu")
    embed = embedder.encode_image

    def encode_image(images, **options):
        time.sleep(0.05)
        return embed(images, **options)

    embedder.encode_image = encode_image
    BulkEmbedder(embedder, cache=Path(cache)).encode_image(many_images())


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_is_missing(counting, bundle, tmp_path):
    cache = tmp_path / "cache"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_embed_slowly, args=(bundle, cache))
    process.start()
    deadline = time.monotonic() + 60
    while len(files_in(cache)) < 7:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    files = files_in(cache)
    assert 7 <= len(files) < 30
    images = many_images()
    found = BulkEmbedder(counting, cache=cache).encode_image(images)
    assert counting.encoded == (4 * (30 - len(files)), 0)
    assert files.items() <= files_in(cache).items()
    assert len(files_in(cache)) == 30
    np.testing.assert_array_equal(found, BulkEmbedder(counting).encode_image(images))
