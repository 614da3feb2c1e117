"""Images have the class that a label or their folder says; what has none is counted."""

import pytest

from tests.builders import encoded, make_image, make_sample, make_samples, of_split, write_split
from vlm.embedding.bulk import digest_of_image
from vlm.errors import DataError
from vlm.evaluation.classification.dataset import (
    class_folders,
    images_in_class_folders,
    images_of_source,
)


@pytest.fixture
def folder(tmp_path):
    samples = [*make_samples(7), make_sample(7, labels={}), make_sample(8, source="photo")]
    return write_split(tmp_path / "data", samples, split="test")


def test_samples_have_the_class_of_their_label(folder):
    images = images_of_source(of_split(folder, "test"), label="group", class_ids=["odd", "even"])
    assert images.labels.tolist() == [1, 0, 1, 0, 1, 0, 1, 1]
    assert images.left_out == 1
    assert images.images[2] == make_sample(2).image


def test_conditions_leave_samples_out_uncounted(folder):
    images = images_of_source(
        of_split(folder, "test", where=["source=photo"]), label="group", class_ids=["odd", "even"]
    )
    assert (images.labels.tolist(), images.left_out) == ([1], 0)


def test_a_label_without_a_name_is_refused(folder):
    with pytest.raises(DataError, match=r"has the group 'even'; expected one of the 1 with names"):
        images_of_source(of_split(folder, "test"), label="group", class_ids=["odd"])


@pytest.mark.parametrize(
    ("label", "where", "said"),
    [
        ("colour", [], "no selected sample .* has the label 'colour'"),
        ("group", ["source=film"], "has no sample where source=film"),
    ],
    ids=["no label", "no sample"],
)
def test_nothing_to_classify_is_refused(folder, label, where, said):
    with pytest.raises(DataError, match=said):
        images_of_source(
            of_split(folder, "test", where=where), label=label, class_ids=["odd", "even"]
        )


def test_a_condition_on_what_no_sample_has_is_refused(folder):
    with pytest.raises(DataError, match=r"no sample of the split 'test' of .* has 'colour'"):
        images_of_source(
            of_split(folder, "test", where=["colour!=red"]),
            label="group",
            class_ids=["odd", "even"],
        )


@pytest.fixture
def images(tmp_path):
    for number, name in enumerate(["b/2.png", "b/1.JPEG", "a/deep/3.webp", "c/4.jpg"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = {"jpg": "jpeg"}.get(path.suffix[1:], path.suffix[1:]).upper()
        path.write_bytes(encoded(make_image(number), suffix))
    (tmp_path / "images" / "a" / "notes.txt").touch()
    (tmp_path / "images" / "readme.txt").touch()
    (tmp_path / "images" / ".cache").mkdir()
    return tmp_path / "images"


def test_images_in_folders_have_the_class_of_their_folder(images):
    assert class_folders(images) == ["a", "b", "c"]
    pictures = images_in_class_folders(images, ["c", "none", "b", "a"])
    assert pictures.images == [
        images / "c/4.jpg", images / "b/1.JPEG", images / "b/2.png", images / "a/deep/3.webp",
    ]  # fmt: skip
    assert pictures.labels.tolist() == [0, 2, 2, 3]
    assert pictures.left_out == 1


def test_the_order_of_folders_is_torchvisions(images):
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(
        str(images), is_valid_file=lambda path: not path.endswith(".txt"), allow_empty=True
    )
    ours = images_in_class_folders(images, class_folders(images))
    assert [name for name in theirs.classes if name != ".cache"] == class_folders(images)
    assert [path for path, _ in theirs.samples] == [str(path) for path in ours.images]


def test_the_fingerprint_tells_images_and_labels_apart(images):
    def fingerprint(*class_ids):
        pictures = images_in_class_folders(images, class_ids)
        return pictures.fingerprint([digest_of_image(image) for image in pictures.images])

    first = fingerprint("a", "b", "c")
    assert fingerprint("a", "b", "c") == first
    assert fingerprint("a", "c", "b") != first
    (images / "c/4.jpg").write_bytes(b"other")
    assert fingerprint("a", "b", "c") != first


def test_folders_without_classes_or_images_are_refused(images):
    with pytest.raises(DataError, match="is not a folder; expected one with a folder for each"):
        class_folders(images / "gone")
    with pytest.raises(DataError, match="has no folders; expected one for each class"):
        class_folders(images / "b")
    with pytest.raises(DataError, match=r"the class folders in .* have no image"):
        images_in_class_folders(images, ["none"])
