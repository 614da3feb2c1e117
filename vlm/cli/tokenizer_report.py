"""Compare tokenizers on captions: tokens, what is cut, what is unknown, and the speed."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.cli.text_sources import TextOptions
from vlm.errors import TokenizerError

if TYPE_CHECKING:
    from vlm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Options(TextOptions):
    """What `vlm tokenizer report` is given."""

    folders: tuple[Path, ...]
    """Folders of tokenizers or bundles; the others are compared with the first."""
    _: KW_ONLY
    limit: int = 100_000
    """How many texts of a language to read, from the first; 0 reads all."""
    json: bool = False
    """Print JSON instead of tables."""
    plot: Path | None = None
    """Also draw this png or svg."""


def run(options: Options) -> None:
    """Measure; print tables or JSON."""
    given = options.given()
    if not options.folders:
        raise TokenizerError("found no folders of tokenizers or bundles; expected at least one")
    if options.limit < 0:
        raise TokenizerError(f"limit is {options.limit}; expected a number of texts, 0 for all")
    from vlm.text.measuring import compare
    from vlm.text.report import check_plot_path, format_report, plot_report

    if options.plot:
        check_plot_path(options.plot)
    tokenizers = _load(options.folders)
    texts: dict[str, list[str]] = {
        language: list(islice(options.texts(language), options.limit or None)) for language in given
    }
    report = compare(tokenizers, texts)
    if options.plot:
        plot_report(report, options.plot)
    if options.json:
        print(json.dumps(report.as_record(), indent=1, ensure_ascii=False))
    else:
        print(format_report(report))


def _load(folders: Sequence[Path]) -> dict[str, "Tokenizer"]:
    from vlm.text.tokenizer import load_tokenizer

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
