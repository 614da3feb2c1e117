"""Read CLIP's, SentencePiece's, BERT's or any Hugging Face tokenizer into a tokenizer folder."""

from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path

from vlm.text.config import Cleaning, TokenizerConfig, Truncation


@dataclass(frozen=True)
class Options:
    """What `vlm tokenizer import` is given; null keeps what the source says."""

    source: str
    """`clip`; a .model, vocab.txt or tokenizer.json file; or a folder with one."""
    _: KW_ONLY
    out: Path
    """Folder to write the tokenizer to."""
    context_length: int | None = None
    """Maximum length of a text in tokens."""
    begin_of_text: str | None = None
    """Piece that opens a text."""
    end_of_text: str | None = None
    """Piece that closes a text."""
    padding: str | None = None
    """Piece that fills a text up."""
    truncation: Truncation | None = None
    """Side on which a text that is too long is cut."""
    cleaning: Cleaning | None = None
    """How a text is cleaned first."""


def run(options: Options) -> None:
    """Import; print the folder."""
    from vlm.text.importing import import_tokenizer

    changes = {field.name: getattr(options, field.name) for field in fields(TokenizerConfig)}
    given = {name: value for name, value in changes.items() if value is not None}
    import_tokenizer(options.source, **given).save(options.out)
    print(options.out)
