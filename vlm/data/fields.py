"""What the fields of a record are: captions by language, concept, source, licence and labels."""

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

from vlm.data.config import SourceConfig
from vlm.errors import DataError
from vlm.records.texts import LANGUAGE_TAG, languages_of, quoted, texts_in, whole_characters
from vlm.text.scripts import language_by_script

UNKNOWN_LANGUAGE = "und"
"""The code of captions whose language is not recognised (ISO 639-2: undetermined)."""

_BY_SCRIPT = "zh or en by script"
CAPTION_FIELDS = ("caption", "text", "title")
# A column `id` or `no` is more often a number than Indonesian or Norwegian.
_OF_LANGUAGE = re.compile(
    rf"(?:(?P<stem>{'|'.join(CAPTION_FIELDS)})_|(?=zh|en))(?P<tag>{LANGUAGE_TAG})"
)


def parts_of(
    record: Mapping[str, Any], config: SourceConfig, *, name: str, where: str
) -> dict[str, Any]:
    """Read a record by the fields that a source names, or as the known layouts have them.

    A record has the columns of a table; or, of an image in a tar or a folder, `json` with the
    object in its `.json`, and `txt` with the lines of its `.txt`.

    Args:
        record: The values by field.
        config: The source.
        name: The sample's concept unless the record has one.
        where: Where the record is; errors begin with it.

    Returns:
        `captions`, `concept`, `source`, `licence` and `labels`, as a `Sample` has them.

    Raises:
        DataError: a value is not what its field must be, or there is no caption.
    """
    captions = captions_of(record, config, where)
    named = set() if config.language_of else set(captions)
    for text in captions.pop("", ()):
        language = language_by_script(text) or UNKNOWN_LANGUAGE
        if language not in named:  # else it is most often one of the named ones again
            captions.setdefault(language, []).append(text)
    if not captions:
        raise no_caption(record, config, where)
    own = own_fields(record)
    concept = value_at(record, config.concept) if config.concept else own.get("concept")
    return {
        "captions": captions,
        "concept": name if concept in (None, "") else _text(concept, where),
        "source": _text(own.get("source"), where),
        "licence": _text(own.get("licence"), where),
        "labels": _labels(own, where),
    }


def captions_of(
    record: Mapping[str, Any], config: SourceConfig, where: str
) -> dict[str, list[str]]:
    """Return a record's captions by language; under '' are those whose field does not name it.

    Blank captions are left out. Arguments and errors as of `parts_of`.
    """
    tagged: dict[str, list[str]] = {}
    if config.captions or config.language_of:
        for language, fields in {**config.captions, "": config.language_of}.items():
            for field in fields:
                texts = texts_in(value_at(record, field), f"{where}, {field!r}")
                tagged.setdefault(language, []).extend(texts)
        return _without_blanks(tagged)
    tagged = _without_blanks(texts_by_tag(record, where) or {})
    captions: dict[str, list[str]] = {}
    for tag, language in languages_of(tagged).items():
        captions.setdefault(language, []).extend(tagged[tag])
    return captions


def no_caption(record: Mapping[str, Any], config: SourceConfig, where: str) -> DataError:
    """Say what a record without a caption has."""
    named = quoted(chain(*config.captions.values(), config.language_of))
    expected = "at least one" if named == "none" else f"some in {named}"
    return DataError(
        f"{where}: found no caption in {quoted(own_fields(record))}; expected {expected}"
    )


def own_fields(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object in the `.json` of a record, or else its columns."""
    own = record.get("json")
    return own if isinstance(own, Mapping) else record


def value_at(record: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, or None; dots lead into nested objects: `json.meta.title`."""
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    inner = record.get(first)
    return value_at(inner, rest) if dot and isinstance(inner, Mapping) else None


def texts_by_tag(record: Mapping[str, Any], where: str) -> dict[str, list[str]] | None:
    """Return the captions of a known layout, blank ones too, by the language tag they have there.

    They are in `captions`, else in the fields of `caption_fields`, else in `txt`; where a value is
    a mapping, by its keys. Those without a language are under ''. The result is None where the
    record names no captions. Errors begin with `where`.
    """
    own = own_fields(record)
    fields = {"captions": ""} if "captions" in own else caption_fields(tuple(own))
    if not fields:
        return {"": texts_in(record["txt"], where)} if "txt" in record else None
    found: dict[str, list[str]] = {}
    for field, language in fields.items():
        value = own[field]
        for tag, texts in (value if isinstance(value, Mapping) else {language: value}).items():
            found.setdefault(whole_characters(tag, where), []).extend(texts_in(texts, where))
    return found


@lru_cache  # the records of a file have the same fields, again and again
def caption_fields(names: tuple[str, ...]) -> Mapping[str, str]:
    """Return which fields hold captions, by their names, and the language of each; '' if unnamed.

    They are `zh`, `en`, `caption_zh`, `text_de`, `title_zh-CN` and the like, and the first of
    `caption`, `text` and `title`: a title next to captions is no caption.
    """
    found = {name: match for name in names if (match := _OF_LANGUAGE.fullmatch(name))}
    tags = {name: match["tag"] for name, match in found.items()}
    languages = languages_of(tags.values())
    stems = {match["stem"] for match in found.values()} | set(CAPTION_FIELDS) & set(names)
    best = next((stem for stem in CAPTION_FIELDS if stem in stems), "")
    return {
        name: languages[tags[name]] if name in tags else ""
        for name in names
        if name in tags or name == best
    }


def understood(record: Mapping[str, Any], config: SourceConfig) -> dict[str, str]:
    """Return which fields of a record are read, and the language of each, for people to check."""
    if config.captions or config.language_of:
        named = {field: language for language, of in config.captions.items() for field in of}
        return named | dict.fromkeys(config.language_of, _BY_SCRIPT)
    own = own_fields(record)
    found = {"captions": "by name"} if "captions" in own else caption_fields(tuple(own))
    if not found and "txt" in record:
        return {"txt": _BY_SCRIPT}
    prefix = "" if own is record else "json."
    return {f"{prefix}{field}": language or _BY_SCRIPT for field, language in found.items()}


def _without_blanks(captions: Mapping[str, list[str]]) -> dict[str, list[str]]:
    kept = {key: [text for text in texts if text.strip()] for key, texts in captions.items()}
    return {key: texts for key, texts in kept.items() if texts}


def _text(value: object, where: str) -> str:
    return "" if value is None else whole_characters(str(value), where)


def _labels(own: Mapping[str, Any], where: str) -> dict[str, str]:
    labels = own.get("labels") or {}
    if not isinstance(labels, Mapping) and "captions" not in own:
        return {}  # another project's, such as the numbers of classes
    if not isinstance(labels, Mapping) or not all(
        isinstance(text, str | None) for text in labels.values()
    ):
        raise DataError(f"{where}: labels is {labels!r:.60}; expected texts by name")
    return {
        _text(name, where): _text(text, where) for name, text in labels.items() if text is not None
    }
