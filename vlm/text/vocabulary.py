"""The contract of a vocabulary: what splits texts into pieces, and what pieces it has."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from vlm.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class NewPiece:
    """A piece to be added to a vocabulary."""

    text: str
    """One or more characters, without space."""
    probability: float
    """Its fraction of the pieces of ordinary text, in (0, 1]; a unigram model scores by it."""


class Vocabulary(ABC):
    """Splits texts into pieces; ids are [0, len), and `content` is that of its file."""

    kind: ClassVar[str]
    """Its name in a tokenizer's description."""
    file_name: ClassVar[str]
    """The file of a tokenizer folder that holds it."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[type["Vocabulary"], tuple[bytes]]:
        """Pickle by the file's content, for worker processes: libraries' objects cannot be."""
        return type(self), (self.content,)

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        """Read the vocabulary of a folder."""
        path = folder / cls.file_name
        if not path.is_file():
            raise TokenizerError(f"{path} is missing")
        return cls(path.read_bytes())

    def files(self) -> Mapping[str, bytes]:
        """Return the content of the vocabulary's files by name."""
        return {self.file_name: self.content}

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of ids."""

    @property
    @abstractmethod
    def unknown_id(self) -> int | None:
        """Id of what the vocabulary cannot express; None where it can express everything."""

    @property
    def special_pieces(self) -> Mapping[str, str]:
        """The pieces to which the vocabulary itself gives a role, by that role."""
        return {}

    @abstractmethod
    def id_of(self, piece: str) -> int | None:
        """Return the id of a piece; None if it has none."""

    @abstractmethod
    def pieces(self) -> list[str]:
        """Return every piece by its id, as the vocabulary itself writes it."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Split texts into pieces, without begin and end.

        Raises:
            TokenizerError: the vocabulary has no piece for what is unknown, and a text needs it.
        """

    @abstractmethod
    def spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return where in its text each piece of `encode` is: its start, and past its end.

        Places are those before the vocabulary's own normalisation. Pieces of one character, such
        as bytes, all have the place of the character.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Join pieces to a text."""

    @abstractmethod
    def with_pieces(self, new: Sequence[NewPiece]) -> "Vocabulary":
        """Return the same vocabulary with pieces added after its last id.

        Raises:
            TokenizerError: a piece is there already or given twice, or the ids have gaps.
        """

    @abstractmethod
    def reduced_to(self, kept: Sequence[int]) -> tuple["Vocabulary", list[int]]:
        """Return a vocabulary of some pieces only, in the same order, and the ids it kept.

        Ids that are needed to reach those to keep are kept as well.

        Raises:
            TokenizerError: the vocabulary is of a kind that cannot be reduced.
        """

    def _check_new(self, new: Sequence[NewPiece]) -> None:
        counts = Counter(piece.text for piece in new)
        known = [text for text, n in counts.items() if n > 1 or self.id_of(text) is not None]
        if known:
            raise TokenizerError(f"duplicate pieces: {', '.join(known[:5])}")


def merged_to(symbols: Iterable[str], place_of: Callable[[str, str], float | None]) -> list[str]:
    """Return what the symbols of one piece are merged to, one after the other.

    `place_of` gives the place of a merge in the order of merges, the least first. What is merged to
    a piece within a text is merged in the same order within the piece alone, because no merge that
    crossed its edges was made.
    """
    row = list(symbols)
    made: list[str] = []
    while True:
        places = [
            (place, index)
            for index, (left, right) in enumerate(pairwise(row))
            if (place := place_of(left, right)) is not None
        ]
        if not places:
            return made
        _, index = min(places)
        row[index : index + 2] = [row[index] + row[index + 1]]
        made.append(row[index])
