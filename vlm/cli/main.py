"""The command `vlm`: finds the module of a verb, reads its options, prints errors as one line."""

import difflib
import logging
import os
import re
import sys
from argparse import Action, ArgumentError
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from vlm.errors import VlmError
from vlm.files import FULL_DISK

VERBS = {
    ("quickstart",): ("vlm.cli.quickstart", "train and score a small model on the emoji images"),
    ("train",): ("vlm.cli.train", "train a model; also under `accelerate launch -m vlm train`"),
    ("eval", "retrieval"): ("vlm.cli.eval_retrieval", "score a bundle on retrieval"),
    ("eval", "classification"): ("vlm.cli.eval_classification", "score zero-shot classification"),
    ("eval", "table"): ("vlm.cli.eval_table", "put results side by side, with published ones"),
    ("eval", "calibrate"): ("vlm.cli.eval_calibrate", "learn which cosines mean a match"),
    ("eval", "index"): ("vlm.cli.eval_index", "put approximate search beside exact search"),
    ("embed",): ("vlm.cli.embed", "turn images into vectors"),
    ("index",): ("vlm.cli.index", "make vectors searchable"),
    ("search",): ("vlm.cli.search", "find images by a text or an image"),
    ("tokenizer", "report"): ("vlm.cli.tokenizer_report", "what tokenizers make of texts"),
    ("tokenizer", "import"): ("vlm.cli.tokenizer_import", "read another project's tokenizer"),
    ("tokenizer", "extend"): ("vlm.cli.tokenizer_extend", "add Chinese pieces to a tokenizer"),
    ("tokenizer", "train"): ("vlm.cli.tokenizer_train", "train a bilingual tokenizer"),
    ("tokenizer", "export"): ("vlm.cli.tokenizer_export", "write a fast tokenizer of the same ids"),
    ("tokenizer", "prune"): ("vlm.cli.tokenizer_prune", "keep only the pieces that texts use"),
    ("convert",): ("vlm.cli.convert", "read or write other projects' checkpoints"),
    ("grow",): ("vlm.cli.grow", "let a model read an extended tokenizer and longer texts"),
    ("data", "index"): ("vlm.cli.data_index", "write the manifest of your own shards"),
    ("data", "check"): ("vlm.cli.data_check", "verify every shard of a data folder"),
}
"""Every verb with the module that runs it: `add_arguments(parser)` and `run(options)`."""

_LITERAL = re.compile(r"\bLiteral\[([^\[\]]*)\]")
_NESTED = r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]"
_UNION, _OPTION = re.compile(r"\bUnion" + _NESTED), re.compile(r"\bOptional" + _NESTED)
_COMMA = re.compile(r", (?![^\[]*\])")  # not one in the brackets of a type
_OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes\s+"
    r"Subtypes: \[(?:[^,\[]*|typing\.Literal\[[^\]]*\]), <class 'NoneType'>\].*",
    re.DOTALL,
)
_WRONG_TYPE = re.compile(
    r'(?:Parser key "(?P<part>[\w.]+)": Problem with given class_path \S+: )?'
    r'Parser key "(?P<key>[\w.]+)": Expected a (?P<type>.+?)\. Got value: (?P<value>.*)'
)
_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text, which stands in quotes where it looks like something else",
}
_STRAY = re.compile(r"unrecognized arguments: ([^\s-]\S*)")
_UNKNOWN_KEY = re.compile(r"(?:does not accept option|unrecognized arguments:|Option) '?([\w.-]+)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, or 2 after an error of the user's."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return _run(words)
    except VlmError as error:
        print(f"vlm: {_without_number(error)}", file=sys.stderr)
    except BrokenPipeError:
        # Whoever read the output has enough of it; the interpreter must not try once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        print(f"vlm: no space left to write: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("vlm: interrupted", file=sys.stderr)
        return 130
    return 2


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from vlm import __version__

        print(f"vlm {__version__}")
        return 0
    verb = next((v for v in VERBS if tuple(words[: len(v)]) == v), None)
    if verb is None:
        raise VlmError(_unknown_verb(words))
    module = import_module(VERBS[verb][0])
    # The meaning of a setting stands under its field in the dataclass.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"vlm {' '.join(verb)}",
        description=module.__doc__,
        exit_on_error=False,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,  # a misspelt option must not become another one
    )
    module.add_arguments(parser)
    words = words[len(verb) :]
    _refuse_repetition(parser, words)
    try:
        options = parser.instantiate(parser.parse_args(list(words)))
    except UnicodeDecodeError as error:
        raise VlmError(f"a configuration file is not UTF-8 text: {error.reason}") from error
    except (ArgumentError, ValueError) as error:
        raise VlmError(_explain(_own_message(error), parser, words)) from error
    module.run(options)
    return 0


class _HelpFormatter(DefaultHelpFormatter):
    """Names types as a person would."""

    def _expand_help(self, action: Action) -> str:
        text: str = super()._expand_help(action)
        for ours, theirs in (("path", "<class 'Path'>"), ("path | null", "Path | null")):
            text = text.replace(theirs, ours)
        text = _LITERAL.sub(lambda found: " | ".join(found[1].split(", ")), text)
        text = _UNION.sub(lambda found: " | ".join(_COMMA.split(found[1])), text)
        return _OPTION.sub(r"\1 | null", text)


def _overview() -> str:
    width = max(len(" ".join(verb)) for verb in VERBS)
    lines = [f"  {' '.join(verb).ljust(width)}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        ["usage: vlm VERB [options]", "", "verbs:", *lines, "", "`vlm VERB --help` lists options."]
    )


def _unknown_verb(words: Sequence[str]) -> str:
    known = [" ".join(verb) for verb in VERBS]
    family = [name for name in known if name.startswith(f"{words[0]} ")]
    asked = " ".join(words[:2]) if family else words[0]
    near = difflib.get_close_matches(" ".join(words[:2]), family or known, n=1)
    near = near or difflib.get_close_matches(words[0], [] if family else known, n=1, cutoff=0.5)
    if near:
        return f"there is no verb {asked!r}; did you mean `vlm {near[0]}`?"
    return f"there is no verb {asked!r}; expected one of {', '.join(family or known)}"


def _without_number(error: VlmError) -> str:
    """Return the message without the system's number of a fault, and with the file told once."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror and cause.filename:
        return str(error).replace(str(cause), cause.strerror)
    return str(error)


def _own_message(error: BaseException) -> str:
    """Return what our check said, or the parser, of a setting that may also be left out.

    Of such a setting the parser says at length that it is not `null` either.
    """
    message, causes = str(error), []
    while error.__cause__ is not None:
        error = error.__cause__
        causes.append(error)
    ours = [str(cause) for cause in causes if isinstance(cause, VlmError)]
    if ours:
        return ours[0]
    wrapped = _OPTIONAL.search(message)
    plain = [str(cause) for cause in causes if not _OPTIONAL.search(str(cause))]
    return message[: wrapped.start()] + plain[0] if wrapped and plain else message


def _refuse_repetition(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Refuse an option of many values that is given twice: the parser would keep the last alone."""
    given = [word.partition("=")[0] for word in words]
    for action in parser._actions:  # argparse has no public list of its options
        times = sum(word in action.option_strings for word in given)
        if action.nargs in ("+", "*") and times > 1:
            raise VlmError(
                f"{action.option_strings[0]} is given {times} times; expected once, with all its "
                "values behind it"
            )


def _explain(message: str, parser: ArgumentParser, words: Sequence[str]) -> str:
    """Turn the parser's complaint into one line, with the nearest key where one is unknown."""
    message = " ".join(message.split())
    wrong = _WRONG_TYPE.search(message)
    if wrong:
        key = ".".join(filter(None, (wrong["part"], wrong["key"])))
        return f"{key} is {wrong['value']}; expected {_in_words(wrong['type'])}"
    stray = _STRAY.search(message)
    if stray:
        return _misplaced(stray[1], parser, words)
    unknown = _UNKNOWN_KEY.search(message)
    if unknown is None:
        return message
    key = unknown[1].lstrip("-")
    known = [
        option.lstrip("-")
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    ]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"there is no option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _in_words(kind: str) -> str:
    """Name a type as a person would."""
    literal = _LITERAL.search(kind)
    return literal[1].replace(", ", " or ") if literal else _TYPES.get(kind, kind)


def _misplaced(value: str, parser: ArgumentParser, words: Sequence[str]) -> str:
    """Say of a word that nothing takes which option it follows, and what that one takes."""
    before = words[: list(words).index(value)] if value in words else ()
    option = next((w.partition("=")[0] for w in reversed(before) if w.startswith("--")), "")
    action = next((each for each in parser._actions if option in each.option_strings), None)
    takes = "no value" if action and action.nargs == 0 else "one value"
    if action is None:
        return f"found {value!r}, which no option takes; expected options by their names"
    return f"{option} takes {takes}; found {value!r} behind it as well"
