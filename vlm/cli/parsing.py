"""Options of a verb: a dataclass becomes a parser, and the words of a shell an instance of it.

A field that may be given by position in Python is positional on the command line as well, and one
whose metadata says what it is `alone` may be given without a value. Nothing here knows a verb or
imports more than jsonargparse, so that help and option errors are quick.
"""

import difflib
import json
import re
from argparse import Action, ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from vlm.errors import ConfigError, VlmError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
Part = TypeVar("Part", bound="DataclassInstance")

_OTHER_NAMES = {
    "gradient_accumulation_steps": "loss.micro_batches",
    "accum_freq": "loss.micro_batches",
    "async": "checkpoint.in_background",
    "lr": "optimizer.learning_rate",
    "epochs": "schedule.steps",
}
"""Settings by the names that they have in other projects."""

_CONFIG_HELP = "YAML file with these options; relative paths in it start from the current folder"

_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}

# What the library's messages have in common; one that reads otherwise is printed as it is.
_UNKNOWN = re.compile(r"[Oo]ption '([\w.-]+)'")
_KEY = re.compile(r'Parser key "([\w.]+)"')
_VALUE = re.compile(r"(?:Got|Given) value: (.*?)(?: Given value type:| - Expected|$)")
_NO_FILE = re.compile(r"Unable to load config '(.*?)'")
_MISSING = re.compile(r"the following arguments are required: (\w+)")


def parse(kind: type[Options], words: Sequence[str], *, prog: str, description: str) -> Options:
    """Return the options that the words of a shell state.

    Raises:
        VlmError: an option is unknown, or a value is not of its type.
    """
    # The meaning of a setting is the docstring under its field.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    settings = _settings_of(kind)
    parser = _Parser(
        prog=prog,
        description=description,
        exit_on_error=False,
        formatter_class=type("Formatter", (_HelpFormatter,), {"settings": settings}),
        allow_abbrev=False,  # a misspelt option must not become another one
    )
    if "config" in settings:
        parser.add_argument("--config", action="config", help=_CONFIG_HELP)
    parser.add_class_arguments(kind, as_group=False, as_positional=True, skip={"config"})
    positional = [field.name for field in fields(kind) if not field.kw_only]
    usage = " ".join([prog, *map(str.upper, positional)])
    alone = {each.name: each.metadata["alone"] for each in fields(kind) if "alone" in each.metadata}
    words = list(_with_values(words, alone))
    arguments, raw = _arguments(words, settings, positional, usage)
    try:
        found = parser.parse_args(arguments)
        for name, value in raw.items():
            found[name] = value
        for name, expected in settings.items():
            # The library accepts anything for a part, and fails where the part is built.
            if is_dataclass(expected) and not isinstance(found.get(name), Namespace):
                raise ConfigError(f"{name} is {found.get(name)}; expected its settings by name")
        values = vars(parser.instantiate(found))
    except UnicodeDecodeError as error:
        raise VlmError(f"a configuration file is not UTF-8 text: {error.reason}") from error
    except (ArgumentError, TypeError, ValueError) as error:
        raise VlmError(_explain(error, settings)) from error
    if values.get("config"):
        values["config"] = Path(values["config"][-1])
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def part_of(options: Any, kind: type[Part]) -> Part:
    """Return the configuration whose fields a verb's options have among their own."""
    names = [field.name for field in fields(kind)]
    return kind(**{name: getattr(options, name) for name in names})


class _Parser(ArgumentParser):
    """Reads relative paths in a configuration file as a shell does: from the current folder."""

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        text = Path(cfg_path).read_text(encoding="utf-8")
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            # The error of a character that YAML does not allow has neither, and two lines.
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
            place = f", line {mark.line + 1}" if mark else ""
            reason = " ".join(str(problem).split())
            raise ConfigError(f"{cfg_path}{place} is not YAML: {reason}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{cfg_path} holds no settings by name; expected YAML such as `a: 1`")
        found: Namespace = self.parse_string(text, *args, **kwargs)
        return found


class _HelpFormatter(DefaultHelpFormatter):
    """Names types as a person would, and shows `--where WHERE ...` and flags as they are given."""

    settings: Mapping[str, Any] = {}

    def _expand_help(self, action: Action) -> str:
        text: str = super()._expand_help(action)
        kind = self.settings.get(action.dest)
        if is_dataclass(kind):
            return "YAML file with the settings below."
        return re.sub(r"type: .*?(?=, default: |\)$)", lambda _: f"type: {_in_words(kind)}", text)

    def _format_args(self, action: Action, default_metavar: Any) -> str:
        kind = self.settings.get(action.dest)
        if _is_flag(kind) and not action.default:
            return ""
        if _is_words(kind) and "." not in action.dest:
            return f"{action.dest.upper()} ..."
        text: str = super()._format_args(action, default_metavar)
        return text

    def format_help(self) -> str:
        text: str = super().format_help()
        return text.replace(" ]", "]")  # a flag takes no value


def _settings_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Return the type of every option by its name, those of parts with their part's before it."""
    found = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        name, hint = prefix + field.name, hints[field.name]
        found[name] = hint
        for part in _flat(hint):
            if is_dataclass(part):
                found |= _settings_of(part, f"{name}.")
    return found


def _flat(kind: Any) -> Iterator[Any]:
    """Give a type and all that it is made of."""
    yield kind
    for argument in get_args(kind):
        yield from _flat(argument)


def _with_values(words: Sequence[str], alone: Mapping[str, str]) -> Iterator[str]:
    """Give the words of a shell, and their value to options that are given without one."""
    for word, after in pairwise([*words, "--"]):
        name = word.removeprefix("--")
        yield f"{word}={alone[name]}" if name in alone and after.startswith("--") else word


def _arguments(
    words: Sequence[str], settings: Mapping[str, Any], positional: Sequence[str], usage: str
) -> tuple[list[str], dict[str, str | Path]]:
    """Write the words of a shell as the library reads them: `--where a b` as a list, flags as true.

    Returns the arguments; and apart from them, by name, texts and paths that may be left out, in
    which the library would take `#cat`, `~` and `null` for YAML's null.
    """
    arguments, free, raw, rest = [], [], {}, list(words)
    seen: set[str] = set()
    while rest:
        word = rest.pop(0)
        option, sign, value = word.partition("=")
        name = _as_setting(option.lstrip("-"), settings)
        kind = settings.get(name, _kind_of_entry(name, settings))
        many = _is_words(kind) and ("." not in name or name not in settings)
        if not word.startswith("-"):
            free.append(word)
            continue
        if kind is None:
            arguments.append(_checked(word, name, settings))
            continue
        values = [value] if sign else _values_of(kind, rest, many=many)
        if not values:
            raise VlmError(f"{option} lacks its value; expected {_expected(kind)}")
        if many:
            if name in seen:
                raise VlmError(f"{option} is given twice; expected once, with all its values")
            seen.add(name)
            values = [json.dumps(values, ensure_ascii=False)]
        plain = [each for each in get_args(kind) if each is not NoneType]
        if plain in ([str], [Path]) and name != "config":
            raw[name] = plain[0](values[0])
        else:
            arguments.append(f"--{name}={values[0]}")  # joined: a value may begin with a dash
    if positional and _is_list(settings[positional[-1]]):
        last = len(positional) - 1
        free[last:] = [json.dumps(free[last:], ensure_ascii=False)]
    if len(free) > len(positional):
        raise VlmError(f"found the argument {free[-1]!r}; expected `{usage} [options]`")
    return arguments + free, raw


def _as_setting(name: str, settings: Mapping[str, Any]) -> str:
    """Return the setting of a name that may have hyphens, as other programs' options do."""
    written = name.replace("-", "_")
    return written if written in settings else name


def _kind_of_entry(name: str, settings: Mapping[str, Any]) -> Any:
    """Return the type of an entry of a mapping, as `--captions.zh` is; None of anything else."""
    part, dot, _ = name.partition(".")
    kind = settings.get(part)
    return get_args(kind)[1] if dot and get_origin(kind) is Mapping else None


def _values_of(kind: Any, rest: list[str], *, many: bool) -> list[str]:
    """Take the values of an option from the words after it; a part's list is one word of YAML."""
    if _is_flag(kind):
        return [rest.pop(0)] if rest[:1] in (["true"], ["false"]) else ["true"]
    following = next((n for n, word in enumerate(rest) if word.startswith("--")), len(rest))
    taken = following if many else min(1, following)
    values, rest[:] = rest[:taken], rest[taken:]
    return values


def _checked(word: str, name: str, settings: Mapping[str, Any]) -> str:
    """Return an option that only the library knows, such as `--help`."""
    of_setting = {name.removesuffix("+"), name.removesuffix(".help")}
    if name in ("h", "help", "print_config") or of_setting & settings.keys():
        return word
    raise VlmError(_unknown(name, settings))


def _unknown(name: str, settings: Mapping[str, Any]) -> str:
    """Say that there is no such setting, and which one may be meant."""
    other = _OTHER_NAMES.get(name.rsplit(".", 1)[-1])
    near = [other] if other in settings else []
    near = near or difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
    return f"there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _explain(error: BaseException, settings: Mapping[str, Any]) -> str:
    """Return one line for what our checks or the library found wrong."""
    message, cause = " ".join(str(error).split()), error.__cause__
    while cause is not None:
        if isinstance(cause, VlmError):
            return str(cause)
        cause = cause.__cause__
    keys = list(dict.fromkeys(_KEY.findall(message)))
    name = ".".join(keys)
    if unknown := _UNKNOWN.search(message):
        return _unknown(".".join([*keys, unknown[1]]), settings)
    if missing := _MISSING.search(message) if keys else None:
        return f"{name} lacks {missing[1]}"
    if no_file := _NO_FILE.search(message):
        if no_file[1].endswith((".yaml", ".yml")):
            return (
                f"{name} is {no_file[1]}, which is missing; relative paths start from {Path.cwd()}"
            )
        return f"{name} is {no_file[1]}; expected its settings by name, or a YAML file with them"
    if (value := _VALUE.search(message)) and name in settings:
        quotes = ", in quotes where YAML takes it for a number"
        if value[1].startswith("{} "):  # of a list, whose entries are a part each
            return f"{name} has an entry without settings; expected at least one in each"
        is_text = settings[name] in (str, str | None)
        expected = _expected(settings[name]) + (quotes if is_text else "")
        return f"{name} is {value[1]}; expected {expected}"
    if "Not of type" in message and name in settings:
        return f"{name} is of another type; expected {_expected(settings[name])}"
    return _KEY.sub(r"\1", message)


def _is_list(kind: Any) -> bool:
    """Tell whether a setting is a list, or may be one."""
    if get_origin(kind) in (Union, UnionType):
        return any(map(_is_list, get_args(kind)))
    return get_origin(kind) in (list, Sequence) or ... in get_args(kind)


def _is_words(kind: Any) -> bool:
    """Tell whether the values of a list may be given word by word; parts are YAML."""
    return _is_list(kind) and not any(map(is_dataclass, get_args(kind)))


def _is_flag(kind: Any) -> bool:
    return kind is bool or set(get_args(kind)) == {bool, NoneType}


def _expected(kind: Any) -> str:
    return _in_words(kind).replace(" | ", " or ")


def _in_words(kind: Any) -> str:
    """Name a type as a person would."""
    arguments = [each for each in get_args(kind) if each is not ...]
    if get_origin(kind) is Literal:
        return " | ".join(map(str, arguments))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_in_words, arguments))
    if get_origin(kind) in (list, Sequence, tuple):
        number = "" if _is_list(kind) else f"{len(arguments)} "
        inner = _in_words(arguments[0])
        return f"list of {number}{inner}s" if inner in _NAMES.values() else f"list of ({inner})"
    if get_origin(kind) is Mapping:
        return f"{_in_words(arguments[1])} by name"
    if kind is NoneType:
        return "null"
    return _NAMES.get(kind, "settings" if is_dataclass(kind) else str(kind))
