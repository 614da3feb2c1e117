"""Evaluation sees open_clip's image; training's changes follow from its generator alone."""

import random
import resource

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from tests.builders import make_image
from vlm.errors import ConfigError
from vlm.images.config import OPENAI_MEAN, OPENAI_STD, AugmentationConfig, PreprocessConfig
from vlm.images.transforms import TrainingTransform, evaluation_transform, preprocess_cfg

SIZE = 32
OFF = {"crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
STRONG = AugmentationConfig(
    crop_area=(0.5, 1.2), rotation=30.0, translation=0.2, flip=0.5, brightness=0.4, contrast=0.4,
    saturation=0.4, hue=30.0, grayscale=0.2,
)  # fmt: skip
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def normalised(image: Image.Image, *, mean=OPENAI_MEAN, std=OPENAI_STD) -> torch.Tensor:
    """Normalise with numpy alone."""
    pixels = (np.asarray(image, np.float64) / 255 - mean) / std
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float()


def shown(tensor: torch.Tensor) -> np.ndarray:
    """Undo the normalisation; return rows of pixels in [0, 1]."""
    return tensor.double().numpy().transpose(1, 2, 0) * OPENAI_STD + OPENAI_MEAN


def muted_image() -> Image.Image:
    """Draw colours that no change of colour in these tests drives to black or white."""
    pixels = np.random.default_rng(0).integers(100, 156, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def evaluate(image: Image.Image, **fields: object) -> torch.Tensor:
    return evaluation_transform(preprocess_cfg(PreprocessConfig(**fields), SIZE))(image)


def augment(image: Image.Image, seed: int = 0, **fields: object) -> torch.Tensor:
    config = AugmentationConfig(**(OFF | fields))
    return TrainingTransform(PreprocessConfig(), config, SIZE)(image, random.Random(seed))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [
        ((60, 40), (48, 32), (8, 0, 40, 32)),
        ((40, 60), (32, 48), (0, 8, 32, 40)),
        ((20, 20), (32, 32), (0, 0, 32, 32)),
        ((96, 32), (96, 32), (32, 0, 64, 32)),
    ],
    ids=["wide", "tall", "small", "very wide"],
)
def test_the_shorter_side_is_resized_and_the_middle_cut_out(size, resized, box, interpolation):
    image = make_image(1, size=size)
    expected = normalised(image.resize(resized, RESAMPLING[interpolation]).crop(box))
    torch.testing.assert_close(evaluate(image, interpolation=interpolation), expected)


def test_squashing_gives_up_the_proportions():
    image = make_image(1, size=(60, 40))
    expected = normalised(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    torch.testing.assert_close(evaluate(image, resize_mode="squash"), expected)


def test_the_longer_side_is_resized_and_the_rest_is_white():
    image = make_image(1, size=(60, 30))
    whole = Image.new("RGB", (SIZE, SIZE), "white")
    whole.paste(image.resize((32, 16), Image.Resampling.BICUBIC), (0, 8))
    torch.testing.assert_close(evaluate(image, resize_mode="longest"), normalised(whole))


def test_mean_and_deviation_are_those_of_the_description():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    image = make_image(1, size=(SIZE, SIZE))
    torch.testing.assert_close(
        evaluate(image, mean=mean, std=std), normalised(image, mean=mean, std=std)
    )


@pytest.mark.parametrize("name", ["size", "mean", "std", "interpolation", "resize_mode"])
def test_an_incomplete_description_is_refused_by_what_it_lacks(name):
    description = preprocess_cfg(PreprocessConfig(), SIZE)
    del description[name]
    with pytest.raises(ConfigError, match=f"the image preprocessing lacks {name}"):
        evaluation_transform(description)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"interpolation": "nearest"}, "interpolation is 'nearest'; expected bicubic or bilinear"),
        ({"resize_mode": "crop"}, "resize_mode is 'crop'; expected shortest, longest or squash"),
    ],
    ids=["interpolation", "resize mode"],
)
def test_an_unknown_choice_is_refused_with_those_there_are(fields, said):
    with pytest.raises(ConfigError, match=said):
        PreprocessConfig(**fields)


def test_training_without_augmentation_only_normalises_an_image_of_the_right_size():
    image = make_image(1, size=(SIZE, SIZE))
    torch.testing.assert_close(augment(image), normalised(image))


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_training_without_augmentation_averages_an_image_of_a_multiple_of_the_size(factor):
    side = factor * SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    blocks = pixels.reshape(SIZE, factor, SIZE, factor, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(shown(augment(Image.fromarray(pixels))), blocks / 255, atol=1 / 255)


@pytest.mark.parametrize("size", [(50, 50), (100, 100), (32, 60), (90, 40), (20, 20)], ids=str)
def test_training_without_augmentation_is_close_to_resizing_the_whole_image(size):
    ramp = np.linspace(20, 230, 400)
    pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp, ramp[::-1, None]), axis=-1)
    image = Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BOX)
    expected = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 255
    squash = TrainingTransform(
        PreprocessConfig(resize_mode="squash"), AugmentationConfig(**OFF), SIZE
    )
    np.testing.assert_allclose(shown(squash(image, random.Random(0))), expected, atol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_training_cuts_a_square_where_evaluation_cuts_the_shorter_side(seed):
    # A ramp along the longer side shows where the cut lies: anywhere, and as wide as it is high.
    ramp = np.broadcast_to(np.arange(0, 200, 2, dtype=np.uint8), (40, 100))
    image = Image.fromarray(np.stack([ramp] * 3, axis=-1))
    transform = TrainingTransform(PreprocessConfig(), AugmentationConfig(**OFF), SIZE)
    found = shown(transform(image, random.Random(seed)))[SIZE // 2, :, 0] * 255
    assert found[-1] - found[0] == pytest.approx(2 * (40 - 40 / SIZE), abs=3)


def test_training_pads_with_white_where_evaluation_does():
    image = Image.new("RGB", (40, 20), "black")
    transform = TrainingTransform(
        PreprocessConfig(resize_mode="longest"), AugmentationConfig(**OFF), SIZE
    )
    found = shown(transform(image, random.Random(0)))
    assert (found > 0.9).all(axis=(1, 2)).sum() == pytest.approx(SIZE / 2, abs=2)


def test_the_interpolation_of_training_is_the_configured_one():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE // 2, SIZE // 2, 3), dtype=np.uint8)
    image, inner = Image.fromarray(pixels), np.s_[4:-4, 4:-4]
    resized = {
        name: (np.asarray(image.resize((SIZE, SIZE), filter_)) / 255)[inner]
        for name, filter_ in RESAMPLING.items()
    }
    for name in RESAMPLING:
        transform = TrainingTransform(
            PreprocessConfig(interpolation=name), AugmentationConfig(**OFF), SIZE
        )
        found = shown(transform(image, random.Random(0)))[inner]
        distances = {other: np.abs(found - resized[other]).mean() for other in resized}
        assert min(distances, key=distances.get) == name
        assert distances[name] < 0.04


def test_equal_generators_give_equal_images_and_others_give_others():
    transform = TrainingTransform(PreprocessConfig(), STRONG, SIZE)
    image = make_image(1)
    first, again, other = (transform(image, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_generators_are_neither_read_nor_moved():
    transform = TrainingTransform(PreprocessConfig(), STRONG, SIZE)
    results = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
            results.append(transform(make_image(1), random.Random(7)))
            after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert before[:2] == after[:2]
        assert before[2].equal(after[2])
    assert torch.equal(*results)


def test_the_image_given_is_left_as_it_was():
    image = make_image(1)
    TrainingTransform(PreprocessConfig(), STRONG, SIZE)(image, random.Random(0))
    assert image.tobytes() == make_image(1).tobytes()


@pytest.mark.parametrize(
    "size", [(40, 40), (90, 20), (20, 90), (1, 1), (1, 50), (300, 200)], ids=str
)
def test_images_of_any_shape_become_squares(size):
    transform = TrainingTransform(PreprocessConfig(), STRONG, SIZE)
    tensor = transform(make_image(1, size=size), random.Random(0))
    assert tensor.shape == (3, SIZE, SIZE)
    assert tensor.dtype == torch.float32
    assert tensor.isfinite().all()


@pytest.mark.parametrize(
    "fields",
    [
        {"rotation": 30.0},
        {"translation": 0.3},
        {"crop_area": (0.3, 0.4)},
        {"crop_area": (1.5, 1.6)},
        {"crop_ratio": (1.9, 2.0)},
        {"flip": 1.0},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"saturation": 0.5},
        {"hue": 90.0},
        {"grayscale": 1.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_each_augmentation_changes_the_image(fields):
    assert not torch.allclose(
        augment(make_image(1), 3, **fields), augment(make_image(1)), atol=0.05
    )


def test_a_certain_flip_mirrors_the_image():
    torch.testing.assert_close(
        augment(make_image(1), flip=1.0), augment(make_image(1)).flip(dims=[2]), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_a_flip_is_as_frequent_as_asked(probability):
    plain = augment(make_image(1))
    flipped = [
        not torch.allclose(augment(make_image(1), seed, flip=probability), plain)
        for seed in range(400)
    ]
    assert abs(np.mean(flipped) - probability) < 0.06


@pytest.mark.parametrize("seed", range(6))
def test_brightness_multiplies_every_pixel_by_one_factor(seed):
    image = muted_image()
    factors = shown(augment(image, seed, brightness=0.5)) / shown(augment(image))
    np.testing.assert_allclose(factors, factors.mean(), rtol=1e-4)
    assert 0.5 <= factors.mean() <= 1.5


@pytest.mark.parametrize("seed", range(6))
def test_contrast_moves_every_pixel_away_from_the_mean_grey_by_one_factor(seed):
    image = muted_image()
    plain = shown(augment(image))
    grey = (plain @ LUMA).mean()
    found = shown(augment(image, seed, contrast=0.5))
    factor = (found - grey).std() / (plain - grey).std()
    np.testing.assert_allclose(found, grey + factor * (plain - grey), atol=1e-4)
    assert 0.5 <= factor <= 1.5


@pytest.mark.parametrize("seed", range(6))
def test_saturation_moves_every_pixel_away_from_its_own_grey_by_one_factor(seed):
    image = muted_image()
    plain = shown(augment(image))
    grey = (plain @ LUMA)[..., None]
    found = shown(augment(image, seed, saturation=0.5))
    factor = (found - grey).std() / (plain - grey).std()
    np.testing.assert_allclose(found, grey + factor * (plain - grey), atol=1e-3)
    assert 0.5 <= factor <= 1.5


@pytest.mark.parametrize("seed", range(6))
def test_hue_turns_every_colour_by_one_angle_and_keeps_its_grey_and_strength(seed):
    axes = np.array([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])  # NTSC's I and Q
    image = muted_image()
    plain, found = shown(augment(image)), shown(augment(image, seed, hue=40.0))
    np.testing.assert_allclose(found @ LUMA, plain @ LUMA, atol=1e-4)
    before, after = ((pixels @ axes.T) @ [1, 1j] for pixels in (plain, found))
    turns = after / before
    np.testing.assert_allclose(np.abs(turns), 1, atol=0.05)
    angles = np.degrees(np.angle(turns))[np.abs(before) > 0.02]
    np.testing.assert_allclose(angles, np.median(angles), atol=0.5)
    assert 0.1 < abs(np.median(angles)) <= 40


def test_losing_colour_leaves_the_grey_of_each_pixel():
    image = muted_image()
    found, plain = shown(augment(image, grayscale=1.0)), shown(augment(image))
    np.testing.assert_allclose(found, (plain @ LUMA)[..., None].repeat(3, axis=-1), atol=1e-3)


def test_colours_stay_between_black_and_white():
    for seed in range(10):
        found = shown(augment(make_image(seed), seed, brightness=0.9, contrast=0.9, saturation=0.9))
        assert found.min() >= -1e-6
        assert found.max() <= 1 + 1e-6


def place_image(side: int) -> Image.Image:
    """Draw each pixel in the colour (2 * column, 2 * row, 0)."""
    steps = np.arange(side, dtype=np.uint8) * 2
    columns, rows = np.broadcast_arrays(steps, steps[:, None])
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1))


def places(tensor: torch.Tensor) -> np.ndarray:
    """Return from which (column, row) of `place_image` each pixel comes."""
    return shown(tensor)[..., :2] * 255 / 2


@pytest.mark.parametrize("seed", range(5))
def test_a_crop_is_a_part_of_the_image_with_the_area_asked_for(seed):
    found = places(augment(place_image(4 * SIZE), seed, crop_area=(0.25, 0.25)))
    # Half a side of 128 pixels in 32 steps: two pixels a step, the same way everywhere.
    np.testing.assert_allclose(np.diff(found[..., 0], axis=1), 2, atol=0.6)
    np.testing.assert_allclose(np.diff(found[..., 1], axis=0), 2, atol=0.6)
    assert found[0, -1, 0] - found[0, 0, 0] == pytest.approx(62, abs=1)
    assert found[-1, 0, 1] - found[0, 0, 1] == pytest.approx(62, abs=1)


def test_the_ratio_of_a_crop_is_its_width_over_its_height():
    found = places(augment(place_image(120), crop_area=(0.25, 0.25), crop_ratio=(2.0, 2.0)))
    width = found[16, -1, 0] - found[16, 0, 0]
    height = found[-1, 16, 1] - found[0, 16, 1]
    assert width / height == pytest.approx(2, abs=0.1)


def test_crops_move_over_the_whole_image_and_not_beyond():
    corners = np.array(
        [
            places(augment(place_image(64), seed, crop_area=(0.25, 0.25)))[0, 0]
            for seed in range(300)
        ]
    )
    np.testing.assert_allclose(corners.min(axis=0), 0, atol=1)
    np.testing.assert_allclose(corners.max(axis=0), 32, atol=1)
    np.testing.assert_allclose(corners.mean(axis=0), 16, atol=2)


@pytest.mark.parametrize("seed", range(5))
def test_a_rotation_turns_around_the_middle_and_keeps_lengths(seed):
    found = places(augment(place_image(128), seed, rotation=40.0))
    right, down = found[16, 20] - found[16, 12], found[20, 16] - found[12, 16]
    for step in (right, down):
        assert np.hypot(*step) == pytest.approx(8 * 4, abs=1.5)
    assert abs(right @ down) < 40  # a right angle, of vectors of length 32
    assert 0 < abs(np.degrees(np.arctan2(right[1], right[0]))) <= 41
    np.testing.assert_allclose(found[15:17, 15:17].mean(axis=(0, 1)), 63.5, atol=1)


def test_a_shift_is_at_most_the_share_asked_for():
    middles = np.array(
        [
            places(augment(place_image(64), seed, translation=0.1))[15:17, 15:17].mean((0, 1))
            for seed in range(200)
        ]
    )
    shifts = middles - 31.5
    assert np.abs(shifts).max() == pytest.approx(6.4, abs=0.8)
    np.testing.assert_allclose(shifts.mean(axis=0), 0, atol=0.8)


@pytest.mark.parametrize(
    "fields",
    [{"rotation": 45.0}, {"translation": 0.5}, {"crop_area": (2.0, 2.0)}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_comes_into_view_is_white(fields):
    found = shown(augment(Image.new("RGB", (40, 40), "black"), seed=3, **fields))
    corners = found[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners.min(axis=-1) > 0.99).any()
    assert (found < 0.01).any()


@pytest.mark.parametrize("seed", range(10))
def test_a_crop_larger_than_the_image_holds_all_of_it(seed):
    found = shown(augment(Image.new("RGB", (64, 64), "black"), seed, crop_area=(4.0, 4.0)))
    black = (found < 0.5).all(axis=-1)
    assert black.sum() == pytest.approx((SIZE / 2) ** 2, rel=0.15)


@pytest.mark.parametrize("size", [(20, 190), (21, 190), (333, 30), (35, 1000)], ids=str)
def test_thin_images_are_cut_before_they_are_resized_to_the_same_image(size):
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    waves = [127 + 120 * np.sin((columns + 2 * rows + 40 * turn) / 40) for turn in range(3)]
    image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    description = preprocess_cfg(PreprocessConfig(), SIZE)
    plain = image_transform_v2(PreprocessCfg(**description), is_train=False)
    # The grid of pixels may lie half a pixel further, which moves slow waves little.
    difference = evaluation_transform(description)(image) - plain(image)
    assert difference.abs().mean() < 0.05
    assert difference.abs().max() < 0.2


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)], ids=str)
def test_a_line_of_pixels_costs_no_memory(size, mode):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = evaluate(Image.new("RGB", size, "white"), resize_mode=mode)
    torch.testing.assert_close(pixels, normalised(Image.new("RGB", (SIZE, SIZE), "white")))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
