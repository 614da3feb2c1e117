"""Train a bilingual SentencePiece tokenizer on the captions of a data folder."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.data.dataset import ShardedSplit
from vlm.text.training import train_sentencepiece


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm tokenizer train`."""
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="data folder")
    parser.add_argument("--split", type=str, default="train", help="split whose captions to read")
    parser.add_argument(
        "--languages", nargs="+", default=["zh", "en"], help="languages of the captions to read"
    )
    parser.add_argument("--vocab_size", type=int, default=4000, help="number of ids")
    parser.add_argument("--context_length", type=int, default=32, help="longest text in tokens")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")


def run(options: Any) -> None:
    """Train; print the folder."""
    captions = ShardedSplit(options.data, options.split).unique_captions(options.languages)
    tokenizer = train_sentencepiece(
        captions, vocab_size=options.vocab_size, context_length=options.context_length
    )
    tokenizer.save(options.out)
    print(options.out)
