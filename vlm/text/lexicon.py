"""What new pieces mean: English words of a dictionary, or vectors of another space."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import regex
from jaxtyping import Float32

from vlm.errors import TokenizerError
from vlm.files import lines_in
from vlm.text.word_lists import cedict_entries

_REMARK = regex.compile(r"\((?:[^()]|(?R))*\)|\[[^]]*\]")
_CHINESE = regex.compile(r"\p{Han}[\p{Han}|·，]*")
# What CC-CEDICT says about a word instead of what the word means.
_NO_MEANING = regex.compile(
    r"CL:|classifier\b|(?:\w+ )*variant of|see (?:also )?[^a-z]"
    r"|surname |abbr\. |used in |also written|(?:\w+ )?pr\.|(?:same as|also) \p{Han}"
)


def read_lexicon(path: Path | None = None) -> dict[str, list[str]]:
    """Return the English translations of Chinese words, in both kinds of characters.

    They come from a UTF-8 file with a word, a tab and one translation a line, or from CC-CEDICT.

    Raises:
        TokenizerError: the file cannot be read, or CC-CEDICT is not installed.
    """
    lexicon: dict[str, list[str]] = {}
    for word, translation in _lines(path) if path else _cedict():
        known = lexicon.setdefault(word, [])
        if translation not in known:
            known.append(translation)
    return lexicon


def read_vectors(
    paths: Sequence[Path], words: Iterable[str]
) -> dict[str, Float32[np.ndarray, " width"]]:
    """Return the vectors of wanted words from files in the text format of word2vec and fastText.

    Each line of these UTF-8 files is a word and its numbers, divided by spaces; a first line with
    two counts is passed over. Several files, one a language, must share one space, as aligned
    vectors do.

    Raises:
        TokenizerError: a file is missing or damaged, or widths differ.
    """
    wanted = set(words)
    vectors: dict[str, Float32[np.ndarray, " width"]] = {}
    width = 0
    for path in paths:
        if not path.is_file():
            raise TokenizerError(f"there is no file of vectors {path}")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                word, *numbers = line.decode("utf-8", "replace").rstrip().split(" ")
                if (number == 1 and len(numbers) == 1) or word not in wanted or word in vectors:
                    continue
                width = width or len(numbers)
                if not numbers or len(numbers) != width:
                    raise TokenizerError(
                        f"{path}, line {number} has {len(numbers)} numbers; expected {width}"
                    )
                try:
                    vectors[word] = np.array(numbers, dtype=np.float32)
                except ValueError as error:
                    raise TokenizerError(f"{path}, line {number}: {error}") from error
    return vectors


def _cedict() -> Iterable[tuple[str, str]]:
    for entry in cedict_entries():
        for definition in entry.definitions:
            for part in _REMARK.sub(" ", definition).split(";"):
                if _NO_MEANING.match(part.strip()):
                    continue
                translation = " ".join(_CHINESE.sub(" ", part).split()).removeprefix("to ")
                if translation:
                    yield entry.simplified, translation
                    yield entry.traditional, translation


def _lines(path: Path) -> Iterable[tuple[str, str]]:
    try:
        lines = lines_in(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"cannot read the lexicon {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        word, _, translation = line.partition("\t")
        if not word.strip() or not translation.strip():
            raise TokenizerError(
                f"{path}, line {number}: expected a word, a tab and a translation, "
                f"found {line[:60]!r}"
            )
        yield word.strip(), translation.strip()
