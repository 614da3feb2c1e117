"""How a tokenizer is made, and how its ids become the tokens of a text."""

from dataclasses import dataclass
from typing import Literal, get_args

from vlm.errors import TokenizerError

Cleaning = Literal["none", "lower", "clip", "glm", "words", "whitespace", "canonicalize"]
Truncation = Literal["right", "left"]

_FEWEST_TOKENS = 3  # a text has at least a begin, an end, and something between them


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How ids of a vocabulary become the tokens of a text; `vlm_tokenizer.json` holds it."""

    context_length: int
    """Longest text in tokens, begin and end included; at least 3."""
    begin_of_text: str | None
    """Piece that begins every text, or null."""
    end_of_text: str
    """Piece that ends every text, where a text tower pools."""
    padding: str
    """Piece that fills a text up to the length of its batch; it may be the end-of-text piece."""
    truncation: Truncation = "right"
    """Which side of a text that is too long is dropped."""
    cleaning: Cleaning = "none"
    """How a text is cleaned first: see `vlm.text.cleaning`."""

    def __post_init__(self) -> None:
        for name, choices in (("truncation", Truncation), ("cleaning", Cleaning)):
            expected = get_args(choices)
            if getattr(self, name) not in expected:
                raise TokenizerError(
                    f"{name} is {getattr(self, name)!r}; expected one of {', '.join(expected)}"
                )
        for name in ("begin_of_text", "end_of_text", "padding"):
            piece = getattr(self, name)
            if not isinstance(piece, str) and (piece, name) != (None, "begin_of_text"):
                raise TokenizerError(f"{name} is {piece!r}; expected a piece")
        if type(self.context_length) is not int or self.context_length < _FEWEST_TOKENS:
            raise TokenizerError(
                f"context_length is {self.context_length!r}; expected an integer, "
                f"at least {_FEWEST_TOKENS}"
            )


@dataclass(frozen=True, kw_only=True)
class SentencePieceConfig:
    """A bilingual SentencePiece vocabulary to be trained."""

    vocab_size: int = 32_000
    """Number of ids, the four special ones and 256 bytes included."""
    context_length: int = 77
    """Longest text in tokens that the tokenizer will return."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """Unigram (Kudo 2018) or byte-pair encoding (Sennrich et al. 2016)."""
    temperature: float = 1.0
    """At least 1: languages count by their bytes to the power of 1 / temperature; 1 leaves them as
    they are, and the larger, the more alike they count."""
    han_coverage: float = 0.9999
    """Fraction in (0, 1] of the Chinese characters of the texts that get a piece of their own."""
    latin_coverage: float = 0.9999
    """The same for Latin letters."""
    other_coverage: float = 0.9999
    """The same for everything else: digits, punctuation, other scripts."""
    separate_spaces: bool = False
    """Whether a space is a piece of its own, so that `board` is one piece whether it begins a word
    or ends one. Where names are short this carries over to new ones; otherwise it costs a token
    a word."""

    def __post_init__(self) -> None:
        if self.model_type not in ("unigram", "bpe"):
            raise TokenizerError(f"model_type is {self.model_type!r}; expected unigram or bpe")
        if not self.temperature >= 1:
            raise TokenizerError(f"temperature is {self.temperature}; expected at least 1")
        for name in ("han_coverage", "latin_coverage", "other_coverage"):
            if not 0 < getattr(self, name) <= 1:
                raise TokenizerError(
                    f"{name} is {getattr(self, name)}; expected more than 0, at most 1"
                )
