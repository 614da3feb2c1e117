"""Read CLIP's, SentencePiece's, BERT's or any Hugging Face tokenizer into a tokenizer folder."""

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from vlm.text.importing import import_tokenizer

_CHANGES = (
    "context_length",
    "begin_of_text",
    "end_of_text",
    "padding",
    "truncation",
    "cleaning",
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm tokenizer import`."""
    parser.add_argument(
        "source",
        type=str,
        help="clip, or a .model, vocab.txt or tokenizer.json file, or a folder with one",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument(
        "--context_length", type=int | None, default=None, help="longest text in tokens"
    )
    for role in ("begin_of_text", "end_of_text", "padding"):
        parser.add_argument(
            f"--{role}", type=str | None, default=None, help="piece, if not the source's own"
        )
    parser.add_argument(
        "--truncation",
        type=Literal["right", "left"] | None,
        default=None,
        help="which side of a text that is too long is lost",
    )
    parser.add_argument(
        "--cleaning",
        type=Literal["none", "lower", "clip", "glm", "words", "whitespace", "canonicalize"] | None,
        default=None,
        help="what is done to a text first",
    )


def run(options: Any) -> None:
    """Import; print the folder."""
    changes = {name: getattr(options, name) for name in _CHANGES}
    given = {name: value for name, value in changes.items() if value is not None}
    import_tokenizer(options.source, **given).save(options.out)
    print(options.out)
