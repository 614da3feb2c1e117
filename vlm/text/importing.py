"""Tokenizers as others publish them, read into the contract."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer as RustTokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from vlm.errors import TokenizerError
from vlm.text.clip_bpe import clip_tokenizer, published_clip_vocabulary
from vlm.text.config import TokenizerConfig
from vlm.text.fast_vocabulary import FILE_NAME, FastVocabulary
from vlm.text.sentencepiece_vocabulary import SentencePieceVocabulary
from vlm.text.tokenizer import DESCRIPTION_NAME, Tokenizer, load_tokenizer
from vlm.text.vocabulary import Vocabulary

_CONTEXT_LENGTH = 77
_MERGES = "merges.txt"
_CLIP_SPECIALS = {
    "begin_of_text": "<|startoftext|>",
    "end_of_text": "<|endoftext|>",
    "padding": "<|endoftext|>",
}
GLM_CONTEXT_LENGTH = 52
"""Tokens of the longest caption that M2-Encoder's published models were trained on."""

# GLM's `sp.model`, which is M2-Encoder's, has `<s>` and `</s>` that its models do not use.
_GLM_PIECES = ("[CLS]", "<|endoftext|>", "<|blank_2|>", "<|blank_10|>")
_GLM = {
    "begin_of_text": "[CLS]",
    "end_of_text": "<|endoftext|>",
    "padding": "<|endoftext|>",
    "truncation": "left",
    "cleaning": "glm",
    "context_length": GLM_CONTEXT_LENGTH,
}
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def import_tokenizer(source: str, **changes: Any) -> Tokenizer:
    """Read a tokenizer of any kind that this package knows.

    * `clip`: CLIP's byte-pair vocabulary, as open_clip ships it;
    * a tokenizer folder of this package;
    * a `.model` file of SentencePiece, between the model's own begin and end, or between GLM's
      where it has GLM's pieces, as M2-Encoder's has;
    * a `vocab.txt` of BERT, lower-cased, with each Chinese character by itself: Chinese-CLIP's
      ids, and its 52 tokens;
    * a `tokenizer.json`, or a folder with one and the `tokenizer_config.json` that names its
      begin, end and padding pieces;
    * a folder of Hugging Face's older kind: CLIP's `vocab.json` and `merges.txt`, perhaps with
      `added_tokens.json`, as Taiyi's CLIP has it, or BERT's `vocab.txt`.

    Args:
        source: One of the above.
        changes: Fields of `TokenizerConfig` that differ from what the source says.

    Raises:
        TokenizerError: the source is none of these, or damaged, or a piece has to be named.
    """
    path = Path(source)
    if source == "clip":
        return _changed(clip_tokenizer(), changes)
    if (path / DESCRIPTION_NAME).is_file():
        return _changed(load_tokenizer(path), changes)
    if (path / _MERGES).is_file() and not (path / FILE_NAME).is_file():
        return _published_clip(path, changes)
    path = next((path / name for name in (FILE_NAME, "vocab.txt") if (path / name).is_file()), path)
    if not path.is_file():
        raise TokenizerError(
            f"there is no tokenizer {source}; expected clip, a tokenizer folder, or a file "
            ".model, vocab.txt or tokenizer.json"
        )
    if path.suffix == ".model":
        model = SentencePieceVocabulary(path.read_bytes())
        is_glm = all(model.id_of(piece) is not None for piece in _GLM_PIECES)
        return _described(model, {**(_GLM if is_glm else model.special_pieces), **changes})
    if path.suffix == ".json":
        named = _special_pieces_beside(path)
        return _described(FastVocabulary(path.read_bytes()), {**named, **changes})
    if path.suffix == ".txt":
        config = TokenizerConfig(
            context_length=52, begin_of_text="[CLS]", end_of_text="[SEP]", padding="[PAD]"
        )
        return _changed(Tokenizer(_wordpiece(path), config), changes)
    raise TokenizerError(f"{path} is not a .model, vocab.txt or tokenizer.json file")


def _published_clip(folder: Path, changes: dict[str, Any]) -> Tokenizer:
    """Read CLIP's vocabulary as Hugging Face has it, and what it was extended by."""
    named = _CLIP_SPECIALS | _special_pieces_beside(folder / _MERGES)
    files = [folder / name for name in ("vocab.json", "added_tokens.json")]
    try:
        ids, added = (
            dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
            for file in files
        )
        merges = (folder / _MERGES).read_text(encoding="utf-8")
    except (ValueError, TypeError) as error:
        raise TokenizerError(f"{folder} holds no vocabulary of CLIP: {error}") from error
    vocabulary = published_clip_vocabulary(
        ids, merges, added, begin=named["begin_of_text"], end=named["end_of_text"]
    )
    return _described(vocabulary, {**named, **changes})


def _changed(tokenizer: Tokenizer, changes: dict[str, Any]) -> Tokenizer:
    return Tokenizer(tokenizer.vocabulary, replace(tokenizer.config, **changes))


def _described(vocabulary: Vocabulary, description: dict[str, Any]) -> Tokenizer:
    description = {"context_length": _CONTEXT_LENGTH, "begin_of_text": None} | description
    missing = [role for role in ("end_of_text", "padding") if role not in description]
    if missing:
        raise TokenizerError(
            f"the tokenizer does not name its {' and '.join(missing)} piece; "
            f"name it with {' and '.join(f'--{role}' for role in missing)}"
        )
    return Tokenizer(vocabulary, TokenizerConfig(**description))


def _special_pieces_beside(path: Path) -> dict[str, Any]:
    """Return what the `tokenizer_config.json` next to a `tokenizer.json` says."""
    sibling = path.with_name("tokenizer_config.json")
    if not sibling.is_file():
        return {}
    try:
        config = dict(json.loads(sibling.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TokenizerError(f"{sibling} is not a JSON object: {error}") from error
    # BERT's kind of tokenizer names its begin `cls` and its end `sep`.
    roles = {
        "begin_of_text": config.get("bos_token") or config.get("cls_token"),
        "end_of_text": config.get("eos_token") or config.get("sep_token"),
        "padding": config.get("pad_token"),
        "truncation": config.get("truncation_side"),
    }
    named = {
        role: piece.get("content", piece) if isinstance(piece, dict) else piece
        for role, piece in roles.items()
        if piece is not None
    }
    longest = config.get("model_max_length")
    # Where nobody knew, Hugging Face writes a number of thirty digits.
    return named | ({"context_length": longest} if type(longest) is int and longest < 1e9 else {})


def _wordpiece(path: Path) -> FastVocabulary:
    """Read BERT's list of pieces, one a line, whose ids are their lines."""
    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text: {error.reason}") from error
    missing = [piece for piece in _BERT_SPECIALS if piece not in pieces]
    if missing:
        raise TokenizerError(f"{path} is not a vocabulary of BERT: it lacks {', '.join(missing)}")
    ids = {piece: index for index, piece in enumerate(pieces)}
    rust = RustTokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=200))
    rust.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
    )
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    rust.add_special_tokens([AddedToken(piece, normalized=False) for piece in _BERT_SPECIALS])
    return FastVocabulary(rust.to_str().encode())
