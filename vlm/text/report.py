"""Tokenizers compared, for people: Markdown tables and a plot."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.errors import TokenizerError
from vlm.files import write_file
from vlm.markdown import markdown_table
from vlm.text.measuring import Report, TextStatistics, TokenizerSize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_SUFFIXES = (".png", ".svg")


def format_report(report: Report) -> str:
    """Return a Markdown table per language, a row per tokenizer, and the words that cost most.

    `of first` is the number of tokens compared with the first tokenizer. The columns line up
    in plain text as well.
    """
    return "\n\n".join(
        _format_language(language, report.statistics[language], report.tokenizers)
        for language in report.statistics
    )


_HEADER = (
    "tokenizer", "ids", "context", "tokens", "of first", "per character", "per word",
    "p50 / p99 / max", "truncated", "unknown", "round trip", "texts/s",
)  # fmt: skip


def _format_language(
    language: str,
    by_name: Mapping[str, TextStatistics],
    sizes: Mapping[str, TokenizerSize],
) -> str:
    first = next(iter(by_name.values()))
    rows = [
        [
            name,
            f"{sizes[name].vocab_size:,}",
            str(sizes[name].context_length),
            f"{s.tokens_per_text:.2f}",
            f"{s.tokens_per_text / first.tokens_per_text:.3f}",
            f"{s.tokens_per_character:.3f}",
            f"{s.tokens_per_word:.3f}",
            f"{s.tokens_p50} / {s.tokens_p99} / {s.tokens_max}",
            f"{s.truncated:,} ({_percent(s.truncated_share)})",
            _percent(s.unknown_share),
            _percent(s.round_trip_share),
            f"{s.texts_per_second:,.0f}",
        ]
        for name, s in by_name.items()
    ]
    words = [
        f"* {name}: "
        + (", ".join(f"{w.word} {w.pieces} x {w.occurrences:,}" for w in s.most_split_words) or "-")
        for name, s in by_name.items()
    ]
    return "\n".join(
        [
            f"## {language}: {first.texts:,} texts, {first.characters / first.texts:.1f} "
            f"characters and {first.words / first.texts:.1f} words each",
            "",
            markdown_table(_HEADER, rows),
            "",
            "Words that cost most, with their pieces and occurrences:",
            "",
            *words,
        ]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def check_plot_path(path: Path) -> None:
    """Refuse a file that `plot_report` cannot write, before any time is spent."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise TokenizerError(f"cannot draw {path}; expected {' or '.join(PLOT_SUFFIXES)}")


def plot_report(report: Report, path: Path) -> None:
    """Draw tokens per character (Chinese) or word, and what is truncated or unknown, to a file."""
    from matplotlib.figure import Figure

    check_plot_path(path)
    names, languages = list(report.tokenizers), list(report.statistics)
    a_panel = max(3.5, 0.45 * len(names) * len(languages))  # inches; every bar has its number
    figure = Figure(figsize=(3 * a_panel, 4.5), layout="constrained")
    tokens, cut, unknown = figure.subplots(1, 3)
    shown: tuple[tuple[Axes, str, str, Callable[[str, TextStatistics], float]], ...] = (
        (tokens, "tokens", "%.2f", _tokens_a_unit),
        (cut, "truncated texts (%)", "%.1f", lambda _, s: 100 * s.truncated_share),
        (unknown, "characters without a piece (%)", "%.1f", lambda _, s: 100 * s.unknown_share),
    )
    for axes, label, number, value in shown:
        for place, name in enumerate(names):
            bars = axes.bar(
                [group + (place + 0.5) / len(names) * 0.8 - 0.4 for group in range(len(languages))],
                [value(language, report.statistics[language][name]) for language in languages],
                width=0.8 / len(names),
                color=f"C{place}",
            )
            axes.bar_label(bars, fmt=number, fontsize="x-small")
        axes.set(ylabel=label, xticks=range(len(languages)), xticklabels=languages)
        axes.margins(y=0.1)
        axes.set_ylim(0, max(1, axes.get_ylim()[1]))  # a hundredth of a percent must look small
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    tokens.set_xticklabels([f"{language}, per {_unit_of(language)}" for language in languages])
    # What every font has, and no formula begins with.
    ascii_names = [name.encode("ascii", "backslashreplace").decode() for name in names]
    legend = [name.replace("$", r"\$") for name in ascii_names]
    figure.legend(tokens.containers, legend, loc="outside upper center", ncols=3)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:].lower(), dpi=120)
    write_file(path, image.getvalue())


def _tokens_a_unit(language: str, statistics: TextStatistics) -> float:
    if _unit_of(language) == "character":
        return statistics.tokens_per_character
    return statistics.tokens_per_word


def _unit_of(language: str) -> str:
    # What is one word of Chinese is a matter of opinion.
    return "character" if language.startswith("zh") else "word"
