"""What the fields of a record are: captions by language, concept, source, licence and labels."""

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

from vlm.data.config import SourceConfig
from vlm.data.records import LANGUAGE_TAG, languages_of, quoted, texts_in, whole_characters
from vlm.errors import DataError
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
    own = record["json"] if isinstance(record.get("json"), Mapping) else record
    if config.captions or config.language_of:
        captions = _captions_by_config(record, config, where)
    else:
        captions = _captions_by_name(own, record, where)
    if not captions:
        named = quoted(chain(*config.captions.values(), config.language_of))
        expected = "at least one" if named == "none" else f"some in {named}"
        raise DataError(f"{where}: found no caption in {quoted(own)}; expected {expected}")
    concept = value_at(record, config.concept) if config.concept else own.get("concept")
    return {
        "captions": captions,
        "concept": name if concept in (None, "") else _text(concept, where),
        "source": _text(own.get("source"), where),
        "licence": _text(own.get("licence"), where),
        "labels": _labels(own, where),
    }


def value_at(record: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, or None; dots lead into nested objects: `json.meta.title`."""
    if name in record:
        return record[name]
    first, dot, rest = name.partition(".")
    inner = record.get(first)
    return value_at(inner, rest) if dot and isinstance(inner, Mapping) else None


def texts_by_tag(record: Mapping[str, Any], name: str) -> dict[str, list[str]] | None:
    """Return the captions of a known layout, blank ones too, by the language tag they have there.

    They are in `captions`, else in the fields of `caption_fields`; where a value is a mapping, by
    its keys. Those without a language are under ''. The result is None where the record names no
    captions. Errors begin with `name`.
    """
    fields = {"captions": ""} if "captions" in record else caption_fields(tuple(record))
    found: dict[str, list[str]] = {}
    for field, language in fields.items():
        value = record[field]
        for tag, texts in (value if isinstance(value, Mapping) else {language: value}).items():
            found.setdefault(whole_characters(tag, name), []).extend(texts_in(texts, name))
    return found if fields else None


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
    inner = isinstance(record.get("json"), Mapping)
    own = record["json"] if inner else record
    found = {"captions": "by name"} if "captions" in own else caption_fields(tuple(own))
    if not found and "txt" in record:
        return {"txt": _BY_SCRIPT}
    prefix = "json." if inner else ""
    return {f"{prefix}{field}": language or _BY_SCRIPT for field, language in found.items()}


def _captions_by_config(
    record: Mapping[str, Any], config: SourceConfig, where: str
) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for language, fields in config.captions.items():
        for field in fields:
            if texts := _not_blank(texts_in(value_at(record, field), f"{where}, {field!r}")):
                captions.setdefault(language, []).extend(texts)
    for field in config.language_of:
        for text in _not_blank(texts_in(value_at(record, field), f"{where}, {field!r}")):
            captions.setdefault(language_by_script(text) or UNKNOWN_LANGUAGE, []).append(text)
    return captions


def _captions_by_name(
    own: Mapping[str, Any], record: Mapping[str, Any], where: str
) -> dict[str, list[str]]:
    found = texts_by_tag(own, where)
    if found is None:
        found = {"": texts_in(record.get("txt"), where)}
    tagged = {tag: kept for tag, texts in found.items() if (kept := _not_blank(texts))}
    unnamed = tagged.pop("", [])
    captions: dict[str, list[str]] = {}
    for tag, language in languages_of(tagged).items():
        captions.setdefault(language, []).extend(tagged[tag])
    named = set(captions)
    for text in unnamed:
        language = language_by_script(text) or UNKNOWN_LANGUAGE
        if language not in named:  # else it is most often one of the named ones again
            captions.setdefault(language, []).append(text)
    return captions


def _not_blank(texts: list[str]) -> list[str]:
    return [text for text in texts if text.strip()]


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
