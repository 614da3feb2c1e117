"""Train a bilingual SentencePiece tokenizer, from the same texts to the same bytes."""

import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache

import regex
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from vlm.errors import TokenizerError
from vlm.text.cleaning import space_words
from vlm.text.config import SentencePieceConfig, TokenizerConfig
from vlm.text.sentencepiece_vocabulary import SPACE, SentencePieceVocabulary
from vlm.text.tokenizer import Tokenizer

PAD_ID, UNKNOWN_ID, BEGIN_ID, END_ID = 0, 1, 2, 3

_SCRIPTS = {"zh": regex.compile(r"\p{Han}"), "en": regex.compile(r"\p{Latin}")}
_EDGE = "\ue000"  # pieces do not cross it; private use, which normalisation leaves alone
_AFTER_SPACE = regex.compile("(?<= )")
_BEFORE_HAN = regex.compile(r"(?<= )(?=\p{Han})")
# What SentencePiece says of sizes, in terms of options that are not ours.
_TOO_LARGE = regex.compile(r"size too high .* <= (\d+)")
_TOO_SMALL = regex.compile(r"smaller than required_chars\. \S+ vs (\d+)")
_TENTHS = 10  # repetitions are whole numbers: languages are balanced to a tenth


def train_sentencepiece(
    texts: Mapping[str, Iterable[str]],
    config: SentencePieceConfig,
    *,
    word_lists: Mapping[str, Mapping[str, float]] | None = None,
) -> Tokenizer:
    """Train a vocabulary with byte fallback on texts in Chinese and English, `zh` and `en`.

    Text is normalised by NFKC and case-folded, so `Cat`, `cat` and full-width `ｃａｔ` share ids.
    Digits are split, and bytes stand in for characters outside the vocabulary, so that no text
    is lost. Training runs on one thread: more would make the result depend on their timing; the
    order and repetition of texts matter to it as well. A list of words with their shares of
    ordinary text counts as much as its language's texts.

    Raises:
        TokenizerError: a language has no text or is none of the two, or the texts cannot fill the
            vocabulary.
    """
    for language in (*texts, *(word_lists or ())):
        if language not in _SCRIPTS:
            raise TokenizerError(
                f"there are texts or words in {language!r}; expected {' and '.join(_SCRIPTS)} only"
            )
    counts: dict[str, dict[str, float]] = {}
    for language, script in _SCRIPTS.items():
        # Texts that are alike are counted, with the space between their words as one.
        written = (" ".join(t.replace(_EDGE, " ").split()) for t in texts.get(language, ()))
        lines = {line: float(n) for line, n in Counter(filter(None, written)).items()}
        counts[language] = lines
        expected = f"expected texts in {' and '.join(_SCRIPTS)}"
        if not lines:
            found = f"there is no text in {language!r} to train a tokenizer on"
            raise TokenizerError(f"{found}; {expected}")
        if not any(script.search(line) for line in lines):
            found = f"none of the {len(lines)} texts in {language!r} has a letter of its script"
            raise TokenizerError(f"{found}; {expected}")
    for language, shares in (word_lists or {}).items():
        size = _bytes_of(counts[language])
        total = sum(len(word.encode()) * share for word, share in shares.items())
        for word, share in shares.items():
            counts[language][word] = counts[language].get(word, 0.0) + size * share / total
    weights = _balance({lang: _bytes_of(lines) for lang, lines in counts.items()}, config)
    repetitions: dict[str, float] = {}
    for language, lines in counts.items():
        for line, count in lines.items():
            repetitions[line] = repetitions.get(line, 0.0) + count * weights[language]
    return _train(_without_rare_characters(repetitions, config), config)


def _reason(error: RuntimeError) -> str:
    """Word what SentencePiece reports in terms of our options."""
    text = str(error).splitlines()[0]
    if most := _TOO_LARGE.search(text):
        return f"expected a vocab_size of at most {most[1]}, or more texts"
    if least := _TOO_SMALL.search(text):
        return f"expected a vocab_size of at least {least[1]}, or fewer characters"
    return text


def _train(repetitions: Mapping[str, float], config: SentencePieceConfig) -> Tokenizer:
    parts = _parts(repetitions, config)
    scale = 1 if all(count.is_integer() for count in parts.values()) else _TENTHS
    lines = [
        f"{part}\t{round(count * scale)}" for part, count in parts.items() if round(count * scale)
    ]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            input_format="tsv",
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=1.0,
            normalization_rule_name="nmt_nfkc_cf",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            max_sentence_length=1 << 20,  # longer ones are passed over
            num_threads=1,
            pad_id=PAD_ID,
            unk_id=UNKNOWN_ID,
            bos_id=BEGIN_ID,
            eos_id=END_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise TokenizerError(
            f"cannot train a vocabulary of {config.vocab_size} on {len(repetitions)} texts: "
            f"{_reason(error)}"
        ) from error
    vocabulary = SentencePieceVocabulary(
        _with_separate_spaces(model.getvalue()) if config.separate_spaces else model.getvalue()
    )
    special = vocabulary.special_pieces
    return Tokenizer(
        vocabulary,
        TokenizerConfig(
            context_length=config.context_length,
            begin_of_text=special["begin_of_text"],
            end_of_text=special["end_of_text"],
            padding=special["padding"],
            cleaning="none" if config.separate_spaces else "words",
        ),
    )


def _parts(repetitions: Mapping[str, float], config: SentencePieceConfig) -> dict[str, float]:
    """Cut texts where no piece may cross, and count the parts that are alike.

    SentencePiece can be given such places as well, by a delimiter or a user-defined symbol, but
    then its unigram trainer takes each of them for one more use of the most used character.
    """
    edge = _AFTER_SPACE if config.separate_spaces else _BEFORE_HAN
    parts: dict[str, float] = {}
    for line, count in repetitions.items():
        text = f" {line}" if config.separate_spaces else space_words(line)
        for part in filter(None, edge.sub(_EDGE, text).split(_EDGE)):
            parts[part] = parts.get(part, 0.0) + count
    return parts


def _with_separate_spaces(model: bytes) -> bytes:
    """Let a space be found before any other piece, and one begin every text."""
    proto = ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    for piece in proto.pieces:
        if piece.piece == SPACE:
            piece.type = ModelProto.SentencePiece.USER_DEFINED
    edited: bytes = proto.SerializeToString(deterministic=True)
    return edited


def _bytes_of(lines: Mapping[str, float]) -> float:
    # A Chinese and an English sentence that say the same have about as many bytes.
    return sum(len(line.encode()) * count for line, count in lines.items())


def _balance(sizes: Mapping[str, float], config: SentencePieceConfig) -> dict[str, float]:
    """Return how often a text of each language is repeated, the least often once.

    Conneau et al. 2020, "Unsupervised Cross-lingual Representation Learning at Scale", section
    3.1, with `alpha = 1 / temperature`.
    """
    weights = {lang: size ** (1 / config.temperature - 1) for lang, size in sizes.items()}
    least = min(weights.values())
    return {language: weight / least for language, weight in weights.items()}


def _without_rare_characters(
    lines: Mapping[str, float], config: SentencePieceConfig
) -> dict[str, float]:
    """Put an edge in the place of characters that are rare within their script."""
    counts: dict[str, dict[str, float]] = {"han": {}, "latin": {}, "other": {}}
    normalised = {line: unicodedata.normalize("NFKC", line).casefold() for line in lines}
    for line, count in lines.items():
        for character in normalised[line].replace(" ", ""):
            of_script = counts[_script_of(character)]
            of_script[character] = of_script.get(character, 0.0) + count
    rare: dict[int, str] = {}
    for script, of_script in counts.items():
        left = getattr(config, f"{script}_coverage") * sum(of_script.values())
        for character in sorted(of_script, key=lambda one: (-of_script[one], one)):
            if left <= 0:
                rare[ord(character)] = _EDGE
            left -= of_script[character]
    if not rare:
        return dict(lines)
    kept: dict[str, float] = {}
    for line, count in lines.items():
        shortened = normalised[line].translate(rare)
        kept[shortened] = kept.get(shortened, 0.0) + count
    return kept


@lru_cache(maxsize=1 << 16)
def _script_of(character: str) -> str:
    if _SCRIPTS["zh"].match(character):
        return "han"
    return "latin" if _SCRIPTS["en"].match(character) else "other"
