"""The language of a caption, recognised from the script that it is written in."""

import regex

from vlm.text.words import HAN

MOST = 0.8
"""Of texts in one script: the others are quotations, numbers and the like."""

_LATIN_WORDS = regex.compile(r"[\p{Latin}]+(?:['’][\p{Latin}]+)*")
_OTHER_LETTERS = regex.compile(r"[^\P{L}\p{Latin}\p{Han}]")
_MOST_OTHER = 0.05  # a Chinese caption may quote a word of Japanese, whose own have Han as well


def language_by_script(text: str) -> str:
    """Return `zh` or `en`, or an empty text where the script says neither.

    A Han character counts as much as a word in Latin letters: `T恤 3D 打印` is Chinese. Other
    languages in Latin letters count as English.
    """
    han, latin = len(HAN.findall(text)), len(_LATIN_WORDS.findall(text))
    other = len(_OTHER_LETTERS.findall(text))
    if other > _MOST_OTHER * (han + latin + other) or not han + latin:
        return ""
    return "zh" if han >= latin else "en"
