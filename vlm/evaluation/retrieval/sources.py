"""Open the benchmarks that sources name: data folders and published files alike."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm.data.manifest import is_data_folder
from vlm.errors import ConfigError, DataError
from vlm.evaluation.config import DuplicatePolicy, RetrievalSource
from vlm.evaluation.retrieval.benchmarks.benchmark import Benchmark
from vlm.evaluation.retrieval.benchmarks.opening import open_benchmark
from vlm.evaluation.retrieval.pairs import (
    RetrievalPairs,
    Texts,
    correct_pairs,
    pairs_of_split,
    translations_of,
)

FOLDER_SPLIT = "test_style"
"""The split of a data folder where none is named."""

_FOR_FOLDERS = ("where",)
_FOR_BENCHMARKS = ("kind", "images", "language", "duplicates", "lower_case", "allowed_share")
_PACKED = ("chinese-clip", "webdataset")
_ALLOWED_SHARE = 0.01


def sources_of(
    entries: Sequence[str | Path | RetrievalSource],
    *,
    common: Mapping[str, Any] | None = None,
    folder_split: str = FOLDER_SPLIT,
) -> list[RetrievalSource]:
    """Return the sources, each with a name of its own.

    Args:
        entries: `NAME=PATH`, paths, or sources.
        common: Settings by the names of `RetrievalSource`'s fields, for sources that do not give
            them.
        folder_split: The split of data folders for which none is given.

    Raises:
        ConfigError: there is no entry, one names no path, or two sources have one name.
    """
    if not entries:
        raise ConfigError("no benchmark is given; expected at least one NAME=PATH or PATH")
    found: dict[str, RetrievalSource] = {}
    for entry in entries:
        if isinstance(entry, Path):
            source = RetrievalSource(path=entry)
        else:
            source = parse_source(entry) if isinstance(entry, str) else entry
        missing = {
            name: value for name, value in (common or {}).items() if getattr(source, name) is None
        }
        source = _named(replace(source, **missing), folder_split)
        if source.name in found:
            raise ConfigError(
                f"two benchmarks are called {source.name}: {found[source.name].path} and "
                f"{source.path}; name them by NAME=PATH"
            )
        found[source.name] = source
    return list(found.values())


def parse_source(text: str) -> RetrievalSource:
    """Read `NAME=PATH` or `PATH`; what has a slash before the first `=` is a path.

    Raises:
        ConfigError: there is no name or no path.
    """
    name, sign, path = text.partition("=")
    if not sign or "/" in name:
        name, path = "", text
    if not path or (sign and not name and path != text):
        raise ConfigError(f"{text!r} names no benchmark; expected NAME=PATH or PATH")
    return RetrievalSource(path=Path(path), name=name)


def open_source(source: RetrievalSource, *, languages: Sequence[str]) -> RetrievalPairs:
    """Open a data folder, or the files of a benchmark, and make its questions.

    Args:
        source: Where it lies and how to ask it.
        languages: The model's languages, in which a data folder is asked by default.

    Raises:
        ConfigError: a setting does not fit the files.
        DataError: the files are missing, damaged or of no known kind, more is missing than
            allowed, or nothing is left to ask.
    """
    if not is_data_folder(source.path):
        return _open_benchmark(source)
    _refuse(source, _FOR_BENCHMARKS, what="a data folder", owner="the files of a benchmark")
    return _open_folder(source, languages)


def _named(source: RetrievalSource, folder_split: str) -> RetrievalSource:
    """Fill in the split of a data folder, and the name."""
    if is_data_folder(source.path):
        split = source.split or folder_split
        return replace(source, split=split, name=source.name or split)
    return replace(source, name=source.name or source.path.absolute().stem)


def _open_folder(source: RetrievalSource, languages: Sequence[str]) -> RetrievalPairs:
    split = source.split or FOLDER_SPLIT
    pairs = pairs_of_split(
        source.path,
        split,
        languages=source.languages or languages,
        where=source.where or (),
    )
    missing = [language for language in source.languages or () if language not in pairs.texts]
    if missing:
        raise DataError(
            f"the split {split!r} of {source.path} has no captions in {' or '.join(missing)} among "
            f"the samples asked for; found {', '.join(pairs.texts)}"
        )
    return pairs


def _open_benchmark(source: RetrievalSource) -> RetrievalPairs:
    share = source.allowed_share
    benchmark = open_benchmark(
        source.path,
        kind=source.kind,
        split=source.split,
        images=source.images,
        language=source.language,
        allowed_share=_ALLOWED_SHARE if share is None else share,
    )
    _refuse(source, _FOR_FOLDERS, what=f"a benchmark ({benchmark.kind})", owner="data folders")
    if benchmark.kind in _PACKED:
        _refuse(
            source,
            ("images",),
            what=f"a benchmark ({benchmark.kind}) that holds its images",
            owner="benchmarks whose images are files of their own",
        )
    pairs = pairs_of_benchmark(
        benchmark,
        duplicates=source.duplicates or "by id",
        lower_case=bool(source.lower_case),
        languages=source.languages or (),
    )
    found = {key: value for key, value in asdict(benchmark.findings).items() if value}
    return replace(pairs, kind=benchmark.kind, split=benchmark.split, findings=found)


def pairs_of_benchmark(
    benchmark: Benchmark,
    *,
    duplicates: DuplicatePolicy = "by id",
    lower_case: bool = False,
    languages: Sequence[str] = (),
) -> RetrievalPairs:
    """Make the questions of a benchmark's files.

    Args:
        benchmark: The images and captions.
        duplicates: Which images are right where several have the same caption.
        lower_case: Whether captions are brought to lower case first, as Chinese-CLIP's and
            M2-Encoder's evaluations do, which also write “ and ” as plain quotation marks.
        languages: The languages to ask in; none for all.

    Raises:
        DataError: the benchmark has no captions in a language that is asked for.
    """
    missing = [language for language in languages if language not in benchmark.captions]
    if missing:
        raise DataError(
            f"{benchmark.name} has captions in {', '.join(benchmark.captions)}; expected "
            f"{', '.join(missing)} as well"
        )
    texts = {
        language: Texts(
            texts=[_lowered(text) for text in captions.texts] if lower_case else captions.texts,
            matches=correct_pairs(captions.texts, captions.pairs, duplicates),
        )
        for language, captions in benchmark.captions.items()
        if not languages or language in languages
    }
    cleaning = [benchmark.cleaning] if benchmark.cleaning != "none" else []
    cleaning += ["lower case, plain quotation marks"] if lower_case else []
    return RetrievalPairs(
        images=benchmark.images,
        texts=texts,
        duplicates=duplicates,
        cleaning="; ".join(cleaning) or "none",
        translations=translations_of(
            {
                language: np.column_stack([captions.pairs, captions.turns])
                for language, captions in benchmark.captions.items()
                if language in texts and captions.turns is not None
            }
        ),
    )


def _lowered(text: str) -> str:
    return text.lower().replace("“", '"').replace("”", '"')


def _refuse(source: RetrievalSource, settings: Sequence[str], *, what: str, owner: str) -> None:
    """Refuse settings that would be ignored; those that say no more than nothing may stand."""
    given = [name for name in settings if getattr(source, name)]
    if given:
        raise ConfigError(
            f"{source.path} is {what}; found {' and '.join(given)}, which "
            f"{'is' if len(given) == 1 else 'are'} for {owner}; expected none, or each benchmark "
            "with settings of its own, as in configs/evaluate"
        )
