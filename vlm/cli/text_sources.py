"""The options that give tokenizer verbs their texts and word lists."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm.errors import TokenizerError

if TYPE_CHECKING:
    from vlm.text.word_lists import Language

LANGUAGES: tuple["Language", ...] = ("zh", "en")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Where texts come from."""

    zh: tuple[str, ...] = ()
    """Sources of Chinese captions, as training reads them, also without images: files, patterns,
    folders and URLs; or texts, .txt and .html, and their folders."""
    en: tuple[str, ...] = ()
    """Sources of English captions, likewise."""
    column: str = ""
    """The field whose captions are in the language asked for; by default found by its name."""
    split: str = "train"
    """The split to read of sources that have several."""

    def texts(self, language: "Language") -> Iterator[str]:
        """Give the texts of a language, none where no source was named; progress on stderr."""
        sources: tuple[str, ...] = getattr(self, language)
        if not sources:
            return iter(())
        from vlm.data.captions import read_captions

        return read_captions(
            sources, language, column=self.column, split=self.split, progress=sys.stderr.isatty()
        )

    def given(self) -> list["Language"]:
        """Return the languages that have texts, at least one."""
        found = [language for language in LANGUAGES if getattr(self, language)]
        if not found:
            raise TokenizerError("give texts by --zh and --en: files, folders or URLs of captions")
        return found


@dataclass(frozen=True, kw_only=True)
class ChineseListOptions:
    """Word lists of Chinese."""

    zh_lists: tuple[str, ...] = ()
    """Chinese word lists: wordfreq, jieba, or files with a word, a tab and its count a line."""
    traditional: float = 0.0
    """Fraction of the Chinese lists to spell in traditional characters, in [0, 1)."""

    def words(self, language: "Language") -> dict[str, float]:
        """Return the mean frequencies of words over the lists of a language, if there are any."""
        from vlm.text.word_lists import mean_shares, read_word_list, with_traditional

        names: tuple[str, ...] = getattr(self, f"{language}_lists")
        words = mean_shares([read_word_list(name, language) for name in names]) if names else {}
        if words and language == "zh" and self.traditional:
            return with_traditional(words, self.traditional)
        return words
