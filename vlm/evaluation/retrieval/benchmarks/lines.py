"""Lines, records and splits of annotation files; what is wrong is named with its line."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlm.errors import DataError

_HEAD = 1 << 16


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Give every line that is not blank, with its number from 1 and without its end.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number} is not text in UTF-8: {error.reason}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def records_of(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Give the object in every line of JSON, with the line's number.

    Raises:
        DataError: a line is no JSON object.
    """
    for number, line in lines_of(path):
        yield number, parse_object(line, f"{path}, line {number}")


def parse_object(text: str, name: str) -> dict[str, object]:
    """Return the JSON object that a text is.

    Raises:
        DataError: it is none; the message begins with `name`.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{name} is a JSON {type(record).__name__}; expected an object")
    return record


def first_record(path: Path) -> dict[str, object]:
    """Return the object in the first line, or nothing if that is none: to see what a file is."""
    try:
        record = json.loads(first_line(path))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def first_line(path: Path) -> str:
    """Return the first line that is not blank, or nothing if it is not text or very long."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return ""
    line = head.lstrip().partition(b"\n")[0]
    try:
        return "" if len(line) == _HEAD else line.decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError:
        return ""


def texts_in(value: object, name: str) -> list[str]:
    """Return one text or a list of texts as a list, without line ends around them.

    Raises:
        DataError: it is something else; the message begins with `name`.
    """
    texts = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise DataError(f"{name}: found {text!r:.60}; expected a caption or a list of them")
        texts.append(text.strip("\r\n"))
    return texts


def choose_split(splits: Iterable[str], asked: str | None, source: Path) -> str:
    """Return the split to read: the one asked for, else the only one, else `test`.

    Raises:
        DataError: there is no such split, or none is asked for and it is not clear which.
    """
    known: Sequence[str] = sorted(set(splits))
    listed = ", ".join(known)
    if asked is None:
        if not known or len(known) == 1:
            return known[0] if known else ""
        if "test" in known:
            return "test"
        raise DataError(f"{source} has the splits {listed}; choose one of them")
    if asked not in known:
        has = f"its splits are {listed}" if known else "it has no splits, so leave the split out"
        raise DataError(f"{source} has no split {asked!r}; {has}")
    return asked
