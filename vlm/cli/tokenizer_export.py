"""Write a SentencePiece tokenizer as a fast tokenizer of Hugging Face too, with the same ids."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.errors import TokenizerError
from vlm.files import write_file


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm tokenizer export`."""
    parser.add_argument(
        "folder", type=Path, help="tokenizer folder, where tokenizer.json is written"
    )


def run(options: Any) -> None:
    """Export; print the folder."""
    from vlm.checkpoints.fast_export import fast_files
    from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
    from vlm.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.folder)
    if not isinstance(tokenizer.vocabulary, SentencePieceVocabulary):
        raise TokenizerError(f"{options.folder} is a tokenizer.json already")
    for name, content in fast_files(tokenizer).items():
        write_file(options.folder / name, content)
    print(options.folder)
