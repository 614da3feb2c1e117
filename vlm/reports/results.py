"""What `vlm eval retrieval` wrote, read back: scores, and how the protocols of runs differ."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.errors import ConfigError, DataError
from vlm.evaluation.retrieval.metrics import CUTOFFS, DIRECTIONS

RECORD_NAME = "retrieval.json"
"""The file of a run's folder with the scores."""

SCORES = tuple(f"{direction}/recall@{k}" for direction in DIRECTIONS for k in CUTOFFS)
"""The names of a row's recalls, as `evaluate_retrieval` calls them after the language."""

_OTHER_RECORDS = {
    "classification.json": "vlm eval classification",
    "index.json": "vlm eval index",
}

WORDS = {
    "images": "{} images",
    "captions": "{} captions",
    "captions_per_image": "{} captions per image",
    "images_without_caption": "{} images without a caption",
    "duplicates": "duplicates {}",
    "cleaning": "cleaning {}",
}
"""How each part of a protocol is written, in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one run scored on one benchmark in one language."""

    run: str
    """The bundle, and the file of the run if several runs have the same bundle."""
    benchmark: str
    language: str
    question: Mapping[str, Any]
    """The protocol, as the record of `vlm.evaluation.retrieval.pairs.Question`."""
    recalls: tuple[float, ...]
    """In per cent, in the order of `SCORES`."""
    context_length: int
    truncated_share: float
    """Ratio in [0, 1] of the run's captions on this benchmark that were truncated."""


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Read what `vlm eval retrieval --out` wrote, in the order of the runs.

    Args:
        paths: Folders of runs, or their `retrieval.json`.

    Raises:
        ConfigError: a run is given twice.
        DataError: a run cannot be read or holds something else.
    """
    files = {given: _record_path(given) for given in paths}
    for given, count in Counter(_record_path(path).resolve() for path in paths).items():
        if count > 1:
            raise ConfigError(f"the run {given} is given {count} times; expected each run once")
    records = {given: _record_of(path) for given, path in files.items()}
    bundles = Counter(record["bundle"] for record in records.values())
    results = []
    for given, record in records.items():
        bundle = record["bundle"]
        run = bundle if bundles[bundle] == 1 else f"{bundle} ({given})"
        try:
            results += [
                _result(run, name, language, of_one)
                for name, of_one in record["benchmarks"].items()
                for language in of_one["questions"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(_not_a_run(given, error)) from error
    return results


def _record_path(given: Path) -> Path:
    if not given.is_dir():
        return given
    path = given / RECORD_NAME
    for name, verb in _OTHER_RECORDS.items():
        if (given / name).is_file() and not path.exists():
            raise DataError(
                f"{given} was written by `{verb} --out`; expected a folder that "
                "`vlm eval retrieval --out` wrote"
            )
    return path


def _record_of(path: Path) -> Mapping[str, Any]:
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read the run {path}: {found}") from error
    if isinstance(record, dict) and isinstance(record.get("bundle"), str):
        benchmarks = record.get("benchmarks")
        if isinstance(benchmarks, dict) and benchmarks:
            return record
    raise DataError(_not_a_run(path, ValueError("there is no bundle with its benchmarks")))


def _result(run: str, benchmark: str, language: str, record: Mapping[str, Any]) -> Result:
    question, reading = record["questions"][language], record["reading"]
    recalls = [record["scores"][f"{language}/{name}"] for name in SCORES]
    for ratio in (*recalls, reading["truncated_share"]):
        if not 0 <= ratio <= 1:
            raise ValueError(f"a ratio is {ratio}; expected a number in [0, 1]")
    if not isinstance(question["fingerprint"], str):
        raise ValueError(f"a fingerprint is {question['fingerprint']}; expected a string")
    return Result(
        run=run,
        benchmark=benchmark,
        language=language,
        question={**question},
        recalls=tuple(100.0 * recall for recall in recalls),
        context_length=reading["context_length"],
        truncated_share=float(reading["truncated_share"]),
    )


def _not_a_run(path: Path, error: Exception) -> str:
    found = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
    return f"{path} is not what `vlm eval retrieval --out` writes: {found}"


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Describe how one protocol differs from another; empty if it does not."""
    parts = [
        f"{WORDS.get(key, f'{key} {{}}').format(in_words(found.get(key)))} instead of "
        f"{in_words(expected.get(key))}"
        for key in dict.fromkeys([*found, *expected])
        if key not in ("fingerprint", "sha256") and found.get(key) != expected.get(key)
    ]
    if not parts and found.get("fingerprint") != expected.get("fingerprint"):
        return "the same numbers of images and captions, but other images, captions or pairs"
    return ", ".join(parts)


def in_words(value: Any) -> str:
    """Return a part of a protocol as people write it: `5,000`, `1 to 5 (mean 2.5)`."""
    if isinstance(value, list | tuple) and len(value) == 3:
        fewest, mean, most = value
        return f"{fewest}" if fewest == most else f"{fewest} to {most} (mean {mean})"
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
