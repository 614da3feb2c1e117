"""Write a SentencePiece tokenizer as a fast tokenizer of Hugging Face too, with the same ids."""

from dataclasses import dataclass
from pathlib import Path

from vlm.errors import TokenizerError
from vlm.files import write_file


@dataclass(frozen=True)
class Options:
    """What `vlm tokenizer export` is given."""

    folder: Path
    """Tokenizer folder, where tokenizer.json is written."""


def run(options: Options) -> None:
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
