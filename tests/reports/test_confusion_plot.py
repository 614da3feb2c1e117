"""The plot of the confusion is an image of a bounded size, whatever the names of the classes."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm.reports.plots import MOST_CLASSES, confusion_png


def entries(matrix):
    """What is not 0 of a matrix, as rows (true class, predicted class, images)."""
    matrix = np.asarray(matrix)
    return np.column_stack([*np.nonzero(matrix), matrix[matrix != 0]]).astype(np.int64)


def opened(confusion, names):
    with Image.open(io.BytesIO(confusion_png(confusion, names, title="en"))) as image:
        image.load()
        return image


def inside(confusion, names):
    """What is drawn within the frame of the axes, in shades of grey."""
    image = np.asarray(opened(confusion, names).convert("L"))
    rows = np.flatnonzero((image < 120).mean(axis=1) > 0.7)
    image = image[rows[0] + 3 : rows[-1] - 2]
    columns = np.flatnonzero(
        (image < 120).all(axis=0)
    )  # of the axes, and of the colour scale next to them
    right = columns[columns > columns[0] + 3][0]
    return image[:, columns[0] + 3 : right - 2]


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 2, 9, 59, MOST_CLASSES])
def test_any_number_of_classes_is_drawn(classes):
    confusion = entries(np.random.default_rng(0).integers(0, 9, (classes, classes)))
    image = opened(confusion, [f"class number {number}" for number in range(classes)])
    assert image.format == "PNG"
    assert 400 < min(image.size) <= max(image.size) < 3200


def test_names_that_the_letters_cannot_show_are_numbered():
    # A letter that the font has not is a warning, and that an error here.
    confusion = entries(np.eye(3))
    numbered = opened(confusion, ["狗", "class 1", "猫"])
    assert numbered.tobytes() == opened(confusion, ["class 0", "class 1", "class 2"]).tobytes()


def test_dollars_and_long_names_are_drawn():
    opened(entries(np.eye(2)), ["$5 and $6 \\frac", "a very long name " * 20])


def test_classes_without_images_are_blank_rows():
    opened(entries(np.zeros((3, 3))), ["a", "b", "c"])


def test_the_diagonal_of_a_perfect_model_is_dark():
    image = np.asarray(opened(entries(np.diag([5, 9])), ["a", "b"]).convert("L"))
    assert (image < 70).mean() > 0.1
    wrong = np.asarray(opened(entries(np.zeros((2, 2))), ["a", "b"]).convert("L"))
    assert (wrong < 70).mean() < 0.1


def test_rows_are_true_classes_and_columns_predicted_ones():
    drawn = inside(np.array([[0, 1, 9], [1, 1, 3], [1, 0, 9]]), ["a", "b"])
    height, width = (side // 2 for side in drawn.shape)
    cells = [drawn[:height, width:], drawn[height:, :width], drawn[height:, width:]]
    all_of_a, most_of_b, few_of_b = (np.median(cell) for cell in cells)
    assert all_of_a < 60 < most_of_b < 120 < few_of_b < 230 < np.median(drawn[:height, :width])


@pytest.mark.slow
def test_each_of_the_most_classes_has_pixels_of_its_own():
    every_other = np.array([[number, number, 1] for number in range(0, MOST_CLASSES, 2)])
    dark = inside(every_other, [str(number) for number in range(MOST_CLASSES)]) < 70
    for axis in (0, 1):
        assert (np.diff(dark.any(axis=axis).astype(int)) == 1).sum() == MOST_CLASSES // 2 - 1
