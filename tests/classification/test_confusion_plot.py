"""The plot of the confusion is a picture of a bounded size, whatever the classes are called."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm.classification.confusion_plot import confusion_png


def opened(confusion, names):
    with Image.open(io.BytesIO(confusion_png(confusion, names, title="en"))) as image:
        image.load()
        return image


@pytest.mark.parametrize("classes", [1, 2, 9, 59, 1000])
def test_any_number_of_classes_is_drawn(classes):
    confusion = np.random.default_rng(0).integers(0, 9, (classes, classes))
    image = opened(confusion, [f"class number {number}" for number in range(classes)])
    assert image.format == "PNG"
    assert 400 < min(image.size) <= max(image.size) < 3200


def test_names_that_the_letters_cannot_show_are_numbered():
    # A letter that the font has not is a warning, and that an error here.
    confusion = np.eye(3, dtype=np.int64)
    numbered = opened(confusion, ["狗", "class 1", "猫"])
    assert numbered.tobytes() == opened(confusion, ["class 0", "class 1", "class 2"]).tobytes()


def test_dollars_and_long_names_are_drawn():
    opened(np.eye(2, dtype=np.int64), ["$5 and $6 \\frac", "a very long name " * 20])


def test_classes_without_pictures_are_blank_rows():
    opened(np.zeros((3, 3), np.int64), ["a", "b", "c"])


def test_the_diagonal_of_a_perfect_model_is_dark():
    image = np.asarray(opened(np.diag([5, 9]), ["a", "b"]).convert("L"))
    assert (image < 70).mean() > 0.1
    wrong = np.asarray(opened(np.zeros((2, 2), np.int64), ["a", "b"]).convert("L"))
    assert (wrong < 70).mean() < 0.1
