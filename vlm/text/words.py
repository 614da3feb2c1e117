"""The words of a text, in Chinese as in languages that write spaces between them."""

import re

import regex

_HAN = (
    "\u3007"  # the ideographic zero, 〇
    "\u3400-\u4dbf\u4e00-\u9fff"  # CJK unified ideographs and extension A
    "\uf900-\ufaff\U0002f800-\U0002fa1f"  # compatibility ideographs
    "\U00020000-\U0002a6df\U0002a700-\U0002ee5f"  # extensions B, and C to F with I
    "\U00030000-\U0003347f"  # extensions G, H and J
)

HAN = re.compile(f"[{_HAN}]")
"""One Han character: an ideograph of any extension, a compatibility ideograph, or 〇."""

# The package `regex` counts combining marks among what words are made of; `re` ends words there.
_OTHER = rf"[^\W_{_HAN}]+"
_RUN = regex.compile(f"(?P<han>[{_HAN}]+)|{_OTHER}(?:['’]{_OTHER})*")


def is_han(character: str) -> bool:
    """Say whether a text is one Han character."""
    return HAN.fullmatch(character) is not None


def split_words(text: str) -> list[str]:
    """Return the words of a text in their order, as they are written there.

    Runs of Han characters are segmented by jieba's dictionary and, where that has no word, its
    hidden Markov model. Any other word is a run of letters and digits with the apostrophes
    inside of it, so `don't` and `3D` are one word, `T恤` and `T-shirt` two. Spaces, punctuation
    and symbols are no words.
    """
    words: list[str] = []
    for run in _RUN.finditer(text):
        if run["han"] is None:
            words.append(run[0])
        else:
            import rjieba  # reads its dictionary, 32 MiB in memory, when it is imported

            words += rjieba.cut(run[0])
    return words
