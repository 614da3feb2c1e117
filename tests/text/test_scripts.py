"""The script of a caption says its language, or nothing."""

import pytest

from vlm.text.scripts import language_by_script


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("一只猫", "zh"),
        ("a cat", "en"),
        ("T恤 3D 打印 新款", "zh"),
        ("Nike Air Max 270 运动鞋", "zh"),
        ("the Chinese character 猫 means cat", "en"),
        ("un café, s'il vous plaît", "en"),
        ("猫がいる", ""),
        ("고양이", ""),
        ("кошка", ""),
        ("12 × 3", ""),
        ("🟥", ""),
        ("", ""),
        ("〇", "zh"),
    ],
)
def test_most_words_decide_and_another_script_is_left_open(text, language):
    assert language_by_script(text) == language
