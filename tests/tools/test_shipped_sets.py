"""Both shipped data folders are whole, bilingual, and keep their test images out of training."""

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from tools.emoji import splits as emoji
from tools.icons import styles as icons
from tools.splits import SPLITS
from vlm.data.manifest import read_manifest


class Shipped(NamedTuple):
    """A data folder, and what is expected of it."""

    folder: Path
    splits: dict
    held_out: str
    sizes: tuple[int, ...]
    """Images in each of `SPLITS`."""
    styles: dict[str, int]
    """Images by style."""
    languages: set[str]
    names: int
    """Concepts, each with a name of its own."""
    largest: int
    """Bytes that the folder stays below."""
    darkest: int
    """What the darkest pixel of every image stays below: it shows something."""

    @property
    def samples(self):
        return [sample for split in SPLITS for sample in self.splits[split]]


@pytest.fixture(scope="module", params=["emoji", "icons"])
def shipped(request, emoji_folder, emoji_splits, icons_folder, icon_splits):
    if request.param == "emoji":
        return Shipped(
            emoji_folder,
            emoji_splits,
            emoji.HELD_OUT_STYLE,
            (8410, 424, 1726, 960, 172),
            {"emojione": 1340, "fluent_3d": 1606, "fluent_flat": 1592,
             "fluent_high_contrast": 1579, "fxemoji": 602,
             "noto": 1898, "noto_blob": 1195, "twemoji": 1880},
            {"en", "zh", "zh-Hant"},
            names=1902,
            largest=25_000_000,
            darkest=240,
        )  # fmt: skip
    return Shipped(
        icons_folder,
        icon_splits,
        icons.HELD_OUT_STYLE,
        (2511, 121, 797, 249, 76),
        {"icon_park": 867, "icon_park_outline": 1157, "icon_park_solid": 873,
         "icon_park_twotone": 857},
        {"en", "zh"},
        names=848,
        largest=8_000_000,
        darkest=60,
    )  # fmt: skip


def test_every_split_and_every_style_has_its_number_of_images(shipped):
    assert tuple(len(shipped.splits[split]) for split in SPLITS) == shipped.sizes
    assert Counter(sample.source for sample in shipped.samples) == shipped.styles
    assert len({sample.uid for sample in shipped.samples}) == len(shipped.samples)


def test_the_set_is_small_enough_for_a_repository(shipped):
    assert sum(path.stat().st_size for path in shipped.folder.iterdir()) < shipped.largest


def test_the_manifest_holds_the_hash_of_every_shard(shipped):
    listed = {
        entry.name: entry.sha256
        for entries in read_manifest(shipped.folder).splits.values()
        for entry in entries
    }
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in shipped.folder.glob("*.tar.gz")
    }
    assert listed == found


def test_every_concept_has_its_own_name_in_chinese_and_english(shipped):
    names = {
        sample.concept: (sample.captions["en"][0], sample.captions["zh"][0])
        for sample in shipped.samples
    }
    assert len(names) == shipped.names
    assert len({english for english, _ in names.values()}) == shipped.names
    assert len({chinese for _, chinese in names.values()}) == shipped.names


def test_captions_are_distinct_texts_and_equal_for_all_images_of_a_concept(shipped):
    captions = {}
    for sample in shipped.samples:
        assert set(sample.captions) == shipped.languages
        for texts in sample.captions.values():
            assert all(texts)
            assert len(set(texts)) == len(texts)
        assert captions.setdefault(sample.concept, sample.captions) == sample.captions


def test_the_held_out_style_is_never_trained_on(shipped):
    for split, samples in shipped.splits.items():
        styles = {sample.source for sample in samples}
        assert (styles == {shipped.held_out}) == split.endswith("_style")
        assert (shipped.held_out in styles) == split.endswith("_style")


def test_every_shard_mixes_the_styles(shipped):
    first = shipped.splits["train"][:500]
    assert {sample.source for sample in first} == set(shipped.styles) - {shipped.held_out}


@pytest.mark.slow
def test_every_image_is_64_pixels_wide_and_high_and_shows_something(shipped):
    for sample in shipped.samples:
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64)), sample.uid
            darkest = image.convert("L").getextrema()[0]
        assert darkest < shipped.darkest, sample.uid


def test_no_style_shows_one_image_twice(shipped):
    shown = Counter((sample.source, sample.image) for sample in shipped.samples)
    assert max(shown.values()) == 1
