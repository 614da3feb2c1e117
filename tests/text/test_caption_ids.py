"""Two captions have one number exactly where they are the same text."""

import pytest

from vlm.text.caption_ids import NO_CAPTION, text_id


@pytest.mark.parametrize(
    "other",
    ["cat on a mat", "CAT ON A MAT", "  cat  on\ta\nmat ", "ｃａｔ on a mat", "cat\u3000on a mat"],
    ids=["itself", "case", "spaces", "full width", "ideographic space"],
)
def test_case_width_and_space_do_not_count(other):
    assert text_id(other) == text_id("Cat on a mat")


@pytest.mark.parametrize(
    "other", ["cats on a mat", "cat on amat", "cat on a mat.", "", "垫子上的猫", "cät on a mat"]
)
def test_other_texts_have_other_numbers(other):
    assert text_id(other) != text_id("cat on a mat")


def test_chinese_texts_differ_by_one_character():
    assert text_id("红苹果") != text_id("青苹果")


@pytest.mark.parametrize(
    ("text", "number"),
    # Half of the first 8 bytes of BLAKE2b, from the command `b2sum --length 64`.
    [
        ("cat", 0x3327DD2C7B9D982F >> 1),
        ("猫", 0x3825438160567439 >> 1),
        ("", 0xE4A6A0577479B2B4 >> 1),
    ],
)
def test_a_number_is_the_same_on_every_machine(text, number):
    assert text_id(text) == number


def test_numbers_fit_a_signed_64_bit_tensor_and_are_never_the_missing_caption():
    numbers = [text_id(str(number)) for number in range(2000)]
    assert len(set(numbers)) == 2000
    assert min(numbers) >= 0
    assert 2**61 < max(numbers) < 2**63  # all 63 bits are in use
    assert NO_CAPTION not in numbers
    assert NO_CAPTION < 0
