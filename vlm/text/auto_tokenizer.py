"""The files with which transformers' `AutoTokenizer`, and so open_clip, gives a tokenizer's ids."""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer as RustTokenizer, normalizers, processors

from vlm.errors import TokenizerError
from vlm.text.clip_bpe import CLIP_VOCAB_SIZE, clip_tokenizer
from vlm.text.fast_vocabulary import FILE_NAME, FastVocabulary
from vlm.text.tokenizer import SETTINGS_NAME, Tokenizer

OWN_TOKENIZER = "tokenizer"
"""A name that open_clip wants to see; under `local-dir:` it then reads the folder itself."""

_OPEN_CLIP_CLEANING = {"clip": "lower", "whitespace": "whitespace", "canonicalize": "canonicalize"}
"""open_clip's own name of what `vlm.text.cleaning` does."""


def for_open_clip(
    text_cfg: Mapping[str, Any], tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a `text_cfg` by which open_clip takes a tokenizer, and the files that it reads.

    CLIP's own tokenizer needs neither. Where there are no files, open_clip's `get_tokenizer`
    fails, instead of giving CLIP's tokenizer to a model of another.
    """
    config = tokenizer.config
    may_be_clip = tokenizer.vocab_size == CLIP_VOCAB_SIZE and config.cleaning == "clip"
    if may_be_clip and tokenizer.vocabulary.files() == clip_tokenizer().vocabulary.files():
        return dict(text_cfg), {}
    # open_clip cleans before any tokenizer but its own, and has no cleaning that changes nothing.
    clean = _OPEN_CLIP_CLEANING.get(config.cleaning, "whitespace")
    own = {"hf_tokenizer_name": OWN_TOKENIZER, "tokenizer_kwargs": {"clean": clean}}
    try:
        files = auto_tokenizer_files(tokenizer, cleaned=config.cleaning in _OPEN_CLIP_CLEANING)
    except TokenizerError:
        files = {}
    return {**text_cfg, **({} if "hf_tokenizer_name" in text_cfg else own)}, files


def auto_tokenizer_files(tokenizer: Tokenizer, *, cleaned: bool = False) -> dict[str, bytes]:
    """Return `tokenizer.json` and `tokenizer_config.json` of a tokenizer, by name.

    A SentencePiece model's are those that its folder holds (`vlm tokenizer export`), or none.
    `cleaned` is whether texts will come cleaned.

    Raises:
        TokenizerError: transformers cannot clean texts like that.
    """
    if not isinstance(tokenizer.vocabulary, FastVocabulary):
        return dict(tokenizer.fast_files)
    config = tokenizer.config
    rust = RustTokenizer.from_buffer(tokenizer.vocabulary.files()[FILE_NAME])
    if not cleaned and config.cleaning != "none":
        if config.cleaning not in ("clip", "lower"):
            raise TokenizerError(f"transformers cannot clean texts like {config.cleaning!r}")
        steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")]
        own = [] if rust.normalizer is None else [rust.normalizer]
        before = steps if config.cleaning == "clip" else []
        rust.normalizer = normalizers.Sequence([*before, normalizers.Lowercase(), *own])
    unknown = getattr(rust.model, "unk_token", None)  # a unigram model knows its id alone
    begin, end = config.begin_of_text, config.end_of_text
    around = [piece for piece in (begin, end) if piece is not None]
    rust.post_processor = processors.TemplateProcessing(
        single=[*around[:-1], "$A", end],
        special_tokens=[(piece, rust.token_to_id(piece)) for piece in around],
    )
    return {
        FILE_NAME: rust.to_str().encode(),
        SETTINGS_NAME: dump(settings_of(tokenizer, unknown=unknown)),
    }


def settings_of(tokenizer: Tokenizer, *, unknown: str | None) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    config = tokenizer.config
    roles = {
        "bos_token": config.begin_of_text,
        "eos_token": config.end_of_text,
        "pad_token": config.padding,
        "unk_token": unknown,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: piece for role, piece in roles.items() if piece is not None},
        "model_max_length": config.context_length,
        "truncation_side": config.truncation,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        # A text that spells a special piece is read as the characters it is.
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def dump(content: Mapping[str, Any]) -> bytes:
    """Return a file's content."""
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()
