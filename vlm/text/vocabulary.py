"""The contract of a vocabulary: what splits texts into pieces, and what pieces it has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class NewPiece:
    """A piece to be added to a vocabulary."""

    text: str
    """One or more characters, without space."""
    probability: float
    """Its share of the pieces of ordinary text, in (0, 1]; a unigram model scores by it."""


@runtime_checkable
class Vocabulary(Protocol):
    """Splits texts into pieces; ids are [0, len)."""

    kind: ClassVar[str]
    """Its name in a tokenizer's description."""

    def __len__(self) -> int:
        """Return the number of ids."""

    @property
    def unknown_id(self) -> int | None:
        """Id of what the vocabulary cannot say; None where it can say everything."""

    @property
    def special_pieces(self) -> Mapping[str, str]:
        """Names of the pieces that the vocabulary itself gives a role, by their role."""

    def id_of(self, piece: str) -> int | None:
        """Return the id of a piece; None if it has none."""

    def pieces(self) -> list[str]:
        """Return every piece by its id, as the vocabulary itself writes it."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Split texts into pieces, without begin and end."""

    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return where in its text each piece of `encode` stands: its start, and past its end.

        Pieces of one character, such as bytes, all stand where the character does.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Join pieces to a text."""

    def files(self) -> Mapping[str, bytes]:
        """Return the content of the vocabulary's files by name."""

    def with_pieces(self, new: Sequence[NewPiece]) -> "Vocabulary":
        """Return the same vocabulary with pieces added after its last id.

        Raises:
            TokenizerError: a piece is there already.
        """

    def reduced_to(self, kept: Sequence[int]) -> tuple["Vocabulary", list[int]]:
        """Return a vocabulary of some pieces only, in the same order, and the ids it kept.

        Args:
            kept: Ids to keep; those that are needed to reach them are kept as well.
        """
