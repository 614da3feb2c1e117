"""Train a bilingual SentencePiece tokenizer from captions, the same bytes every time."""

import io
from collections.abc import Iterable

import sentencepiece

from vlm.errors import TokenizerError
from vlm.text.sentencepiece_tokenizer import SentencePieceTokenizer

PAD_ID, UNKNOWN_ID, BEGIN_ID, END_ID = 0, 1, 2, 3

_SPACE = "▁"  # SentencePiece's sign for one


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    context_length: int,
    character_coverage: float = 0.9999,
) -> SentencePieceTokenizer:
    """Train a unigram model (Kudo 2018) with byte fallback on texts in any mixture of languages.

    Text is normalised by NFKC and case-folded, so `Cat`, `cat` and full-width `ｃａｔ` share ids.
    Digits are split, and bytes stand in for characters outside the vocabulary, so that no text
    is lost. A space is a piece of its own, so that `board` is one piece whether it begins a word
    or ends one, and what is learned of it in one place is known in the other.

    Training runs on one thread: more would make the result depend on their timing.

    Args:
        texts: The training captions; order and repetition matter to the result.
        vocab_size: Number of ids, the four special ids and 256 bytes included.
        context_length: Longest text in tokens that the tokenizer will return.
        character_coverage: Share in (0, 1] of the characters that get a piece of their own.

    Raises:
        TokenizerError: there are no texts, or they cannot fill the vocabulary.
    """
    lines = [line for text in texts if (line := " ".join(text.split()))]
    if not lines:
        raise TokenizerError("there is no text to train a tokenizer on; expected captions")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            normalization_rule_name="nmt_nfkc_cf",
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=[_SPACE],
            num_threads=1,
            pad_id=PAD_ID,
            unk_id=UNKNOWN_ID,
            bos_id=BEGIN_ID,
            eos_id=END_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TokenizerError(
            f"cannot train a vocabulary of {vocab_size} on {len(lines)} texts: {reason}"
        ) from error
    return SentencePieceTokenizer(model.getvalue(), context_length=context_length)
