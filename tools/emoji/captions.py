"""The captions of emoji: names and keywords in three languages, and what is known besides."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from vlm.errors import DataError

if TYPE_CHECKING:
    from opencc import OpenCC

# Words and numbers: no emoticons, and none of the halves of names in quotation marks.
_WORDS = re.compile(r"[a-z0-9][a-z0-9 '’:-]*", re.IGNORECASE)
_VULGAR = frozenset({"shit", "shitface"})


def captions_of(
    entries: Mapping[str, Mapping[str, Any]], keywords: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """Return the captions of a concept by language: the name first, no text twice.

    Args:
        entries: By language, its entry in emojibase's table of that language.
        keywords: Further English ones, as emojilib writes them.
    """
    own = {
        language: [entry["label"], *entry.get("tags", ())] for language, entry in entries.items()
    }
    return {
        "en": _distinct([*own["en"], *filter(_is_proper, map(_spaced, keywords))]),
        # Taiwan's words for things are words that people on the mainland know: 拖鞋 next to 凉鞋.
        "zh": _distinct([*own["zh"], *chain.from_iterable(map(_simplified, own["zh-Hant"]))]),
        "zh-Hant": _distinct(own["zh-Hant"]),
    }


def read_keywords(emojilib: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Read English keywords by emoji, without variation selectors, from the package `emojilib`."""
    table = json.loads(emojilib["dist/emoji-en-US.json"])
    return {emoji.replace("\ufe0f", ""): keywords for emoji, keywords in table.items()}


@cache
def _simplifier() -> "OpenCC":
    try:
        from opencc import OpenCC
    except ModuleNotFoundError as error:
        raise DataError(
            "simplifying captions needs OpenCC; run `pip install 'vlm[emoji]'`"
        ) from error
    return OpenCC("tw2sp")


def _simplified(text: str) -> list[str]:
    """Return a caption in simplified characters; one is a list of keywords in a single text."""
    return re.split("[，、]", _simplifier().convert(text))


def _spaced(text: str) -> str:
    return re.sub(r"[_\s]+", " ", text).strip()


def _is_proper(text: str) -> bool:
    return _WORDS.fullmatch(text) is not None and text.lower() not in _VULGAR


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """Return texts in their order, without blanks and those that differ by case from an earlier."""
    found: dict[str, str] = {}
    for text in filter(None, map(str.strip, texts)):
        found.setdefault(text.lower(), text)
    return tuple(found.values())
