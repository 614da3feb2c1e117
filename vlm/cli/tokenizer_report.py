"""Compare tokenizers on captions: tokens, what is cut, what is unknown, and the speed."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vlm.cli.text_sources import LANGUAGES, add_text_arguments, read_texts
from vlm.errors import TokenizerError
from vlm.text.measuring import compare
from vlm.text.report import check_plot_path, format_report, plot_report
from vlm.text.tokenizer import Tokenizer, load_tokenizer


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of `vlm tokenizer report`."""
    parser.add_argument(
        "folders", nargs="+", type=Path,
        help="folders of tokenizers or bundles; the others are compared with the first",
    )  # fmt: skip
    add_text_arguments(parser)
    parser.add_argument(
        "--limit", type=int, default=100_000, help="first texts of a language to read; 0 for all"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", type=Path | None, default=None, help="also draw this png or svg")


def run(options: Any) -> None:
    """Measure; print tables or JSON."""
    given = [language for language in LANGUAGES if getattr(options, language)]
    if not given:
        raise TokenizerError("give texts by --zh and --en: files or folders of captions")
    if options.limit < 0:
        raise TokenizerError(f"limit is {options.limit}; expected a number of texts, 0 for all")
    if options.plot:
        check_plot_path(options.plot)
    tokenizers = _load(options.folders)
    sources = {language: read_texts(options, language) for language in given}
    texts: dict[str, list[str]] = {
        language: list(islice(captions, options.limit or None))
        for language, captions in sources.items()
    }
    report = compare(tokenizers, texts)
    if options.plot:
        plot_report(report, options.plot)
    if options.json:
        print(json.dumps(report.as_record(), indent=1, ensure_ascii=False))
    else:
        print(format_report(report))


def _load(folders: Sequence[Path]) -> dict[str, Tokenizer]:
    # Not by `vlm.bundle`: it would import all that models need, which takes as long as a report.
    return {
        name: load_tokenizer(folder / "tokenizer" if (folder / "vlm.json").is_file() else folder)
        for name, folder in zip(_names(folders), folders, strict=True)
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """Name folders by the ends of their paths, as short as tells them apart."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for path, count in Counter(paths).items():
        if count > 1:
            raise TokenizerError(f"{path} is given {count} times; expected different folders")
    parts = [1] * len(paths)
    while True:
        names = [str(Path(*p.parts[-n:])) for p, n in zip(paths, parts, strict=True)]
        counts = Counter(names)
        if len(counts) == len(names):
            return names
        parts = [n + (counts[name] > 1) for n, name in zip(parts, names, strict=True)]
