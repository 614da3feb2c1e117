"""Class names in each language, and the prompts that they are filled into."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import DataError
from vlm.files import lines_in
from vlm.storage.places import is_remote, read_small, shown

_BETWEEN_SYNONYMS = re.compile(r"\s*(?:；|;\s)\s*")
_PLACEHOLDER = re.compile(r"\{c?\}")  # CLIP_benchmark's files write {c}
_ARTICLE = re.compile(r"\b(?:an?|the)\s+(?=\{c?\})", re.IGNORECASE)
_OWN_ARTICLE = re.compile(r"(?:an?|the|some)\s", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassNames:
    """The classes of a data set, in one order."""

    ids: tuple[str, ...]
    """Their labels or folders."""
    names: Mapping[str, Sequence[tuple[str, ...]]]
    """By language, the names of every class: one, or several synonyms."""


def read_class_names(
    sources: Sequence[str],
    languages: Sequence[str],
    *,
    folders: Sequence[str] = (),
    label: str = "",
) -> ClassNames:
    """Read class names from one file for all languages, or from a file for each.

    A JSON or YAML file gives the names by class: a string, a list of synonyms, or either by
    language. It may hold several such tables, such as `groups` and `classes`; `label` selects one.
    Any other file has one name per line, in the order of the sorted folders. Synonyms in one string
    are separated by "；" or "; ". Names without a language are in the one that is asked for.

    Args:
        sources: A path or a URL, or `LANGUAGE=PATH` for each language.
        languages: The languages that are wanted.
        folders: Names of the class folders; empty where classes are labels of samples.
        label: Name of the label with a sample's class.

    Raises:
        DataError: a file cannot be read, lacks a class or a language, or the files differ in
            their classes.
    """
    parts = [source.partition("=") for source in sources]
    by_language = [(name, path) for name, sign, path in parts if sign and "/" not in name]
    if len(sources) == 1 and not by_language:
        return _read(sources[0], tuple(languages), folders, label)
    files = dict(by_language)
    if set(files) != set(languages) or len(sources) != len(languages):
        raise DataError(
            f"class names are given as {' '.join(sources)}; expected one file, or "
            f"{' '.join(f'{language}=FILE' for language in languages)}"
        )
    read = {language: _read(files[language], (language,), folders, label) for language in languages}
    ids = read[languages[0]].ids
    for language, of_language in read.items():
        if of_language.ids != ids:
            raise DataError(
                f"{shown(files[language])} has other classes, or another order, than "
                f"{shown(files[languages[0]])}"
            )
    return ClassNames(ids=ids, names={lang: read[lang].names[lang] for lang in languages})


def read_templates(source: str, languages: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the prompt templates of each language.

    Args:
        source: Name of a set in `templates.yaml` (`general`, `drawings`, `name`), or path of a
            YAML or JSON file with lists of templates by language.
        languages: The languages that are wanted.

    Raises:
        DataError: there is no such set or file, a language is missing, or a template is invalid.
    """
    shipped = resources.files("vlm.evaluation.classification").joinpath("templates.yaml")
    sets = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    if source in sets:
        record: Any = sets[source]
    elif Path(source).is_file():
        record = _parsed(source, "templates")
    else:
        raise DataError(
            f"there are no templates {source!r}; expected {', '.join(sets)} or a YAML or JSON file"
        )
    if not isinstance(record, Mapping):
        raise DataError(f"the templates {source} are not lists by language")
    lists = {language: found for language, found in record.items() if found}
    missing = [language for language in languages if language not in lists]
    if missing:
        raise DataError(
            f"the templates {source} are not in {', '.join(missing)}; their languages are "
            f"{', '.join(map(str, lists)) or 'none'}"
        )
    return {language: _checked(lists[language], language, source) for language in languages}


def prompts_of(names: str | Sequence[str], templates: Sequence[str]) -> list[str]:
    """Return the prompts of one class: each of its names in each of the templates.

    A name with its own article, such as "a face", replaces the template's article.
    """
    names = (names,) if isinstance(names, str) else names
    return [_filled(template, name) for name in names for template in templates]


def _read(file: str, languages: tuple[str, ...], folders: Sequence[str], label: str) -> ClassNames:
    record, path = _parsed(file, "class names"), shown(file)
    if not isinstance(record, dict | list):
        raise DataError(f"{path} has neither names by class nor a list of names")
    if isinstance(record, list):
        if len(record) != len(folders):
            raise DataError(
                f"{path} is a list of {len(record)} names; expected {len(folders)}, one for each "
                "class folder"
                if folders
                else f"{path} is a list of names; expected names by label"
            )
        record = dict(zip(folders, record, strict=True))
    record = _table_of(record, label, path)
    entries = {str(class_id): entry for class_id, entry in record.items()}
    missing = sorted(set(folders) - entries.keys())
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(f"{path} has no name for {len(missing)} of the class folders: {some}")
    names = {
        language: [
            _synonyms(entry, language, languages, f"{class_id!r} in {path}")
            for class_id, entry in entries.items()
        ]
        for language in languages
    }
    return ClassNames(ids=tuple(entries), names=names)


def _table_of(record: dict[str, Any], label: str, path: str) -> dict[str, Any]:
    """Return the table of a label, if the file holds several."""
    table = next((record[name] for name in (f"{label}s", f"{label}es") if name in record), record)
    if not isinstance(table, dict) or not table:
        raise DataError(f"{path} has no names by class")
    inner = [list(entry.values()) if isinstance(entry, dict) else [] for entry in table.values()]
    if all(of_one and all(isinstance(each, dict) for each in of_one) for of_one in inner):
        raise DataError(
            f"{path} has tables of {' and '.join(table)}; expected one for the label {label!r}"
        )
    return table


def _parsed(file: str, what: str) -> Any:
    """Read JSON, YAML, or the lines of any other file, without empty ones at the end."""
    path = shown(file)
    try:
        content = read_small(file) if is_remote(file) else Path(file).read_bytes()
        text = content.decode("utf-8-sig")
        if path.lower().endswith(".json"):
            record = json.loads(text)
        elif path.lower().endswith((".yaml", ".yml")):
            record = yaml.safe_load(text)
        else:
            record = lines_in(text)
            while record and not record[-1].strip():
                record.pop()
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot read the {what} {path}: {reason}") from error
    return record


def _synonyms(entry: Any, language: str, languages: tuple[str, ...], where: str) -> tuple[str, ...]:
    if isinstance(entry, dict):
        if language not in entry:
            raise DataError(
                f"the class {where} has no name in {language!r}; its languages are "
                f"{', '.join(map(str, entry)) or 'none'}"
            )
        entry = entry[language]
    elif len(languages) > 1:
        raise DataError(
            f"the class {where} has names in one language; name it with --languages, or give a "
            f"file for each of {', '.join(languages)}"
        )
    texts = entry if isinstance(entry, list) else [entry]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"the class {where} has the name {entry!r}; expected a string or a list")
    return tuple(name for text in texts for name in _BETWEEN_SYNONYMS.split(text.strip()) if name)


def _filled(template: str, name: str) -> str:
    if _OWN_ARTICLE.match(name):
        template = _ARTICLE.sub("", template)
    return _PLACEHOLDER.sub(lambda _: name, template)


def _checked(templates: Any, language: str, source: str) -> tuple[str, ...]:
    if not isinstance(templates, list):
        raise DataError(
            f"the templates {source} in {language!r} are {templates!r:.80}; expected a list"
        )
    for template in templates:
        if not isinstance(template, str) or not _PLACEHOLDER.search(template):
            raise DataError(
                f"{template!r} in the templates {source} is not a template; expected {{}} in place "
                "of the class name"
            )
    return tuple(templates)
