"""Prompts: class names filled into templates in several languages."""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import DataError

_PLACEHOLDER = re.compile(r"\{c?\}")  # CLIP_benchmark's files write {c}
_ARTICLE = re.compile(r"\b(?:an?|the)\s+(?=\{c?\})", re.IGNORECASE)
_OWN_ARTICLE = re.compile(r"(?:an?|the|some)\s", re.IGNORECASE)


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
        record = _read_yaml(Path(source))
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


def _filled(template: str, name: str) -> str:
    if _OWN_ARTICLE.match(name):
        template = _ARTICLE.sub("", template)
    return _PLACEHOLDER.sub(lambda _: name, template)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the templates {path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"cannot read the templates {path}: {reason}") from error


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
