"""What is done to a string before it is split into pieces."""

import html
import re
import string
from collections.abc import Callable, Mapping

import ftfy

from vlm.text.words import is_han

_PLAIN = re.compile(
    "["
    " -%'-~"  # ASCII but for control characters and `&`, which may begin an HTML entity
    "\u3000-\u3002\u3008-\u3011\u3014-\u301f"  # Chinese punctuation
    "\u3400-\u4dbf\u4e00-\u9fff"  # Chinese characters
    "\uff01-\uff05\uff07-\uff5e"  # full-width ASCII
    "]*"
)
"""Texts that ftfy changes in nothing but the width of their ASCII."""

_NARROW = {0x3000: " "} | {wide: chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)}

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def clean_clip(text: str) -> str:
    """Clean as CLIP's own tokenizer does: mended encoding, no HTML entities, one space, lower case.

    The same as `ftfy.fix_text`, two times `html.unescape`, the collapse of white space and
    `str.lower` (Radford et al. 2021, the released `SimpleTokenizer`), an order of magnitude
    sooner for most texts in English and Chinese.
    """
    return clean_whitespace(text).lower()


def clean_whitespace(text: str) -> str:
    """Mend the encoding, resolve HTML entities and write white space as one space, case kept.

    What open_clip does before a tokenizer of transformers.
    """
    return " ".join(_mended(text).split())


def canonicalize(text: str) -> str:
    """Clean as SigLIP's tokenizers do: mended, without ASCII punctuation, in lower case.

    Zhai et al. 2023 ("Sigmoid loss for language image pre-training"), as open_clip does it.
    """
    return " ".join(_mended(text).translate(_NO_PUNCTUATION).lower().split())


def _mended(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text.translate(_NARROW)
    return html.unescape(html.unescape(ftfy.fix_text(text)))


_SPACES = re.compile(" {2,}")
_LONGEST_BLANK = 10


def mark_spaces(text: str) -> str:
    """Write runs of 2 to 10 spaces as GLM's pieces `<|blank_2|>` to `<|blank_10|>`.

    A longer run is as many tens as it has, and what is left.
    """
    return _SPACES.sub(lambda run: _blanks(len(run[0])), text)


_BLANK = re.compile(r"<\|blank_(10|[2-9])\|>")


def restore_spaces(text: str) -> str:
    """Undo `mark_spaces`."""
    return _BLANK.sub(lambda blank: " " * int(blank[1]), text)


def _blanks(length: int) -> str:
    tens, rest = divmod(length, _LONGEST_BLANK)
    last = " " if rest == 1 else f"<|blank_{rest}|>" if rest else ""
    return f"<|blank_{_LONGEST_BLANK}|>" * tens + last


def space_words(text: str) -> str:
    """Write white space as one space, and one before a text that does not begin in Chinese.

    So a word has the same piece at the start of a text as after a space, and Chinese text, which
    has no spaces, needs no piece for one.
    """
    words = " ".join(text.split())
    return words if not words or is_han(words[0]) else f" {words}"


CLEANING: Mapping[str, Callable[[str], str]] = {
    "none": lambda text: text,
    "lower": str.lower,
    "clip": clean_clip,
    "glm": mark_spaces,
    "words": space_words,
    "whitespace": clean_whitespace,
    "canonicalize": canonicalize,
}
"""By its name in a tokenizer's description."""

RESTORING: Mapping[str, Callable[[str], str]] = {"glm": restore_spaces, "words": str.lstrip}
"""What undoes a cleaning, where something can."""
