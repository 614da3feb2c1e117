"""A style and some concepts are kept for testing, the same ones every time."""

from collections import Counter

import pytest

from tools.splits import split_of


@pytest.mark.parametrize(
    ("new_style", "new_concept", "split"),
    [
        (False, True, "test_novel"),
        (True, True, "test_novel_style"),
        (True, False, "test_style"),
    ],
)
def test_held_out_concepts_and_style_are_tested(new_style, new_concept, split):
    assert split_of("noto", "1F600", new_style=new_style, new_concept=new_concept) == split


def test_about_one_seen_image_in_twenty_is_for_validation():
    splits = Counter(
        split_of("twemoji", f"{index:X}", new_style=False, new_concept=False)
        for index in range(4000)
    )
    assert set(splits) == {"train", "val"}
    assert 0.04 < splits["val"] / 4000 < 0.06
