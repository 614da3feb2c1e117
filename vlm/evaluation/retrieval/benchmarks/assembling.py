"""From what a reader found in files to a benchmark: checked, counted, languages and tags told."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm.errors import DataError
from vlm.evaluation.retrieval.benchmarks.benchmark import Benchmark, Captions, Findings, check
from vlm.evaluation.retrieval.benchmarks.images import ImageFiles, ImageFolder, Images
from vlm.text.words import HAN

_TAG = re.compile(r"(?<=\S)[:#/][A-Za-z]{1,4}$")
_TAGGED = 0.9  # of all words; untagged texts have next to none that look so
_KANA_OR_HANGUL = re.compile("[\u3040-\u30ff\uac00-\ud7af]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a user wants of a path."""

    path: Path
    split: str | None = None
    images: Path | None = None
    """The folder with the images; None for the folder of the file."""
    language: str | None = None
    """Language of captions that do not say it; where files do, the only one to keep."""
    allowed_share: float = 0.01


class Row(NamedTuple):
    """One caption as a file has it."""

    text: str
    image_ids: Sequence[str]
    line: int
    """Where it is, counted from 1 in the listing's unit."""
    language: str = ""
    """Empty where the file does not say."""
    turns: Mapping[str, int] = {}
    """By the ids of images, as `Captions` has them; told when all rows are known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """What a reader found, before it is checked."""

    split: str = ""
    image_ids: Sequence[str]
    """In the order of the files; one may occur again."""
    read: Callable[[int], Path | bytes]
    """Gives the image at a position of `image_ids`."""
    missing: frozenset[str] = frozenset()
    """Those of the ids that have no image."""
    looked_in: Path | None = None
    rows: Sequence[Row]
    unit: str = "line"
    files: tuple[Path, ...]
    notes: Sequence[str] = ()
    translated: bool = True
    """Whether the n-th captions of an image in two languages say the same."""


def listing_of_files(
    names: Iterable[str],
    folder: ImageFolder,
    *,
    rows: Sequence[Row],
    files: tuple[Path, ...],
    split: str = "",
    unit: str = "line",
    notes: Sequence[str] = (),
    translated: bool = True,
) -> Listing:
    """List images that are files of their own, found by names, which are also their ids."""
    names = list(names)
    paths = [folder.find(name) for name in names]
    missing = frozenset(name for name, path in zip(names, paths, strict=True) if path is None)
    known = tuple(path or folder.folder for path in paths)  # what is missing is never read
    return Listing(
        split=split, image_ids=names, read=ImageFiles(known), missing=missing,
        looked_in=folder.folder, rows=rows, unit=unit, files=files, notes=notes,
        translated=translated,
    )  # fmt: skip


def assemble(listing: Listing, request: Request, *, kind: str) -> Benchmark:
    """Make the benchmark.

    Raises:
        DataError: more is wrong than the request allows, nothing is left, or a language is
            neither told nor recognised.
    """
    source = f"{request.path}{f' ({listing.split})' if listing.split else ''}"
    positions = {name: position for position, name in enumerate(listing.image_ids)}
    kept = [name for name in positions if name not in listing.missing]
    counts: Counter[str] = Counter(
        duplicate_image_ids=len(listing.image_ids) - len(positions),
        missing_images=len(positions.keys() & listing.missing),
    )
    examples = {}
    if counts["missing_images"]:
        first = next(name for name in positions if name in listing.missing)
        examples["missing_images"] = f"{first!r} in {listing.looked_in}"
    rows, notes = _with_languages(_cleaned(listing.rows, counts), request)
    usable = _usable(_with_turns(rows), positions, listing, counts, examples)
    captions = _by_language(
        usable,
        {name: place for place, name in enumerate(kept)},
        counts,
        translated=listing.translated,
    )
    described = {image for of_one in captions.values() for image in of_one.pairs[:, 1].tolist()}
    findings = Findings(
        images_listed=len(positions),
        captions_listed=len(rows),
        images_without_caption=len(kept) - len(described),
        examples=examples,
        notes=(*listing.notes, *notes),
        **counts,
    )
    check(findings, source=source, allowed_share=request.allowed_share)
    if not captions:
        raise DataError(f"{source} has no caption with an image; expected at least one")
    return Benchmark(
        name=f"{request.path.resolve().name}{f'/{listing.split}' if listing.split else ''}",
        kind=kind,
        split=listing.split,
        images=Images(listing.read, np.array([positions[name] for name in kept], np.int64)),
        image_ids=kept,
        captions=captions,
        findings=findings,
        files=listing.files,
        cleaning="line ends removed"
        + "; part-of-speech tags removed and words joined" * bool(counts["tagged_captions"]),
    )


def language_of(texts: Iterable[str], name: str) -> tuple[str, str]:
    """Return `zh` or `en` by the letters that texts are written in, and a note that says so.

    Raises:
        DataError: they are mostly in other letters, or there are none.
    """
    joined = "".join(texts)
    han, latin = len(HAN.findall(joined)), len(_LATIN.findall(joined))
    letters = max(1, sum(map(str.isalpha, joined)))
    other = len(_KANA_OR_HANGUL.findall(joined)) / letters
    note = f"{name}: {han / letters:.0%} of the letters are Han, {latin / letters:.0%} Latin"
    if han >= letters / 2 and other < 0.05:
        return "zh", f"{note}; taken for Chinese"
    if latin >= 0.8 * letters:
        return "en", f"{note}; taken for English"
    raise DataError(f"{note}, which is clearly neither zh nor en; give the language (--language)")


def _cleaned(rows: Sequence[Row], counts: Counter[str]) -> Sequence[Row]:
    """Remove tags, language by language, before a language is told by the letters."""
    cleaned = list(rows)
    by_language: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_language.setdefault(row.language, []).append(place)
    for places in by_language.values():
        texts = without_tags([rows[place].text for place in places])
        for place, text in zip(places, texts, strict=True):
            if text != rows[place].text:
                cleaned[place] = rows[place]._replace(text=text)
                counts["tagged_captions"] += 1
    return cleaned


def _with_languages(rows: Sequence[Row], request: Request) -> tuple[Sequence[Row], Sequence[str]]:
    """Tell untold languages, and keep the one that is asked for if there is one."""
    notes: list[str] = []
    asked = request.language
    if any(not row.language for row in rows):
        untold = (row.text for row in rows if not row.language)
        if asked is None:
            asked_or_found, note = language_of(untold, request.path.name)
            notes.append(note)
        else:
            asked_or_found = asked
        rows = [row if row.language else row._replace(language=asked_or_found) for row in rows]
    kept = [row for row in rows if asked in (None, row.language)]
    if rows and not kept:
        known = ", ".join(sorted({row.language for row in rows}))
        raise DataError(f"{request.path} has no caption in {asked!r}; its languages are {known}")
    return kept, notes


def _with_turns(rows: Iterable[Row]) -> Iterator[Row]:
    """Count the captions of each image and language, before any is left out."""
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        turns = {name: seen[row.language, name] for name in row.image_ids}
        seen.update((row.language, name) for name in turns)
        yield row._replace(turns=turns)


def _usable(
    rows: Iterable[Row],
    positions: Mapping[str, int],
    listing: Listing,
    counts: Counter[str],
    examples: dict[str, str],
) -> list[Row]:
    """Leave out what is empty or has no image, and count it."""
    usable = []
    for row in rows:
        place = f"{listing.unit} {row.line}"
        if not row.text.strip():
            counts["empty_captions"] += 1
            examples.setdefault("empty_captions", place)
            continue
        unknown = [name for name in row.image_ids if name not in positions]
        if unknown or not row.image_ids:
            counts["unknown_ids"] += 1
            named = f"{place}, {unknown[0]!r}" if unknown else f"{place}, which names none"
            examples.setdefault("unknown_ids", named)
        known = [
            name for name in row.image_ids if name in positions and name not in listing.missing
        ]
        if known:
            usable.append(row._replace(image_ids=known))
    return usable


def _by_language(
    rows: Sequence[Row], places: Mapping[str, int], counts: Counter[str], *, translated: bool
) -> dict[str, Captions]:
    of_language: dict[str, tuple[list[str], list[tuple[int, int, int]]]] = {}
    for row in rows:
        own, found = of_language.setdefault(row.language, ([], []))
        names = dict.fromkeys(row.image_ids)
        found += [(len(own), places[name], row.turns[name]) for name in names]
        own.append(row.text)
    captions = {}
    for language, (own, found) in of_language.items():
        counts["duplicate_captions"] += len(own) - len(set(own))
        columns = np.array(found, dtype=np.int64).reshape(-1, 3)
        captions[language] = Captions(
            texts=own, pairs=columns[:, :2], turns=columns[:, 2] if translated else None
        )
    return captions


def without_tags(texts: Sequence[str]) -> list[str]:
    """Remove part-of-speech tags, as in `两:m 只:q 狗:n`, if nearly every word of all has one.

    The words of a text that had tags are joined, with a space only between two that are in ASCII.
    """
    words = [word for text in texts for word in text.split()]
    tagged = sum(_TAG.search(word) is not None for word in words)
    if not tagged or tagged < _TAGGED * len(words):
        return list(texts)
    return [_joined([_TAG.sub("", word) for word in text.split()]) for text in texts]


def _joined(words: Sequence[str]) -> str:
    between = [
        " " if before[-1:].isascii() and after[:1].isascii() else ""
        for before, after in pairwise(words)
    ]
    return "".join(part for pair in zip(words, [*between, ""], strict=True) for part in pair)
