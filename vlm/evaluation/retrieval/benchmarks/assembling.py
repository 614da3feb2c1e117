"""From what a reader found in a benchmark's files to pairs: checked, counted, languages named."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlm.errors import DataError
from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.images import ImageFolder, Images
from vlm.evaluation.retrieval.pairs import RetrievalPairs, Texts, correct_pairs, translations_of
from vlm.records.texts import languages_of
from vlm.storage.places import shown
from vlm.text.scripts import MOST, language_by_script

_ALLOWED_SHARE = 0.01
_TAG = re.compile(r"(?<=\S)[:#/][A-Za-z]{1,4}$")
_TAGGED = 0.9  # of all words; untagged texts have next to none that look so
_PLAIN_QUOTES = str.maketrans("“”", '""')


class Row(NamedTuple):
    """One caption as a file has it."""

    text: str
    image_ids: Sequence[str]
    """MUGE's captions have several."""
    place: str
    """Where it is in the file, such as `line 3`."""
    language: str = ""
    """As the file names it; empty where it does not."""


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
    unusable: Sequence[str] = ()
    """Why each sample that is in none of these cannot be used."""
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    translated: bool = True
    """Whether the n-th captions of an image in two languages say the same."""


def listing_of_files(
    names: Iterable[str],
    folder: ImageFolder,
    *,
    rows: Sequence[Row],
    split: str = "",
    notes: Sequence[str] = (),
    translated: bool = True,
) -> Listing:
    """List images that are files of their own, found by names, which are also their ids."""
    names = list(names)
    paths = [folder.find(name) for name in names]
    missing = frozenset(name for name, path in zip(names, paths, strict=True) if path is None)
    known = tuple(path or folder.folder for path in paths)  # what is missing is never read
    return Listing(
        split=split, image_ids=names, read=known.__getitem__, missing=missing,
        looked_in=folder.folder, rows=rows, notes=notes, translated=translated,
    )  # fmt: skip


def choose_split(splits: Iterable[str], asked: str | None, path: Path) -> str:
    """Return the split to read: the one asked for, else the only one, else `test`."""
    known = sorted(set(splits))
    if asked is None:
        if len(known) < 2:
            return known[0] if known else ""
        if "test" in known:
            return "test"
        raise DataError(f"{path} has the splits {', '.join(known)}; choose one of them")
    if asked not in known:
        has = f"its splits are {', '.join(known)}" if known else "it has no splits, so leave it out"
        if not known and path.is_dir() and any(path.glob("*-*.tar*")):
            has += f", or let `vlm data index {path}` write a manifest of its shards"
        raise DataError(f"{path} has no split {asked!r}; {has}")
    return asked


def assemble(listing: Listing, source: RetrievalSource, *, kind: str) -> RetrievalPairs:
    """Make the pairs: leave out what is empty or has no image, and count it.

    Raises:
        DataError: more is wrong than the source allows, nothing is left, a language is neither
            named nor recognised, or one that is asked for has no captions.
    """
    path = shown(source.path)
    name = f"{path}{f' ({listing.split})' if listing.split else ''}"
    # Of images with one id the last counts, as in an LMDB.
    positions = {each: position for position, each in enumerate(listing.image_ids)}
    kept = [each for each in positions if each not in listing.missing]
    places = {each: place for place, each in enumerate(kept)}
    cleaned = _texts_without_tags(listing.rows)
    languages, notes = _languages(listing.rows, cleaned, source)
    rows = zip(listing.rows, cleaned, languages, strict=True)
    texts, pairs, empty, unknown = _by_language(rows, positions, places)
    missing = [f"{each!r} in {listing.looked_in}" for each in positions if each in listing.missing]
    faults = {
        "missing_images": missing, "unusable_samples": listing.unusable,
        "unknown_ids": unknown, "empty_captions": empty,
    }  # fmt: skip
    _check(faults, images=len(positions), captions=len(listing.rows), source=source, name=name)
    if not texts:
        raise DataError(f"{name} has no caption with an image; expected at least one")
    if absent := [each for each in source.languages or () if each not in texts]:
        raise DataError(
            f"{name} has captions in {', '.join(texts)}; expected {', '.join(absent)} as well"
        )
    tagged = sum(row.text != text for row, text in zip(listing.rows, cleaned, strict=True))
    described = {image for of_one in pairs.values() for _, image, _ in of_one}
    findings = {
        "images_listed": len(positions),
        "captions_listed": len(listing.rows),
        **{fault: len(cases) for fault, cases in faults.items()},
        "duplicate_captions": sum(len(own) - len(set(own)) for own in texts.values()),
        "duplicate_image_ids": len(listing.image_ids) - len(positions),
        "tagged_captions": tagged,
        "images_without_caption": len(kept) - len(described),
        "examples": {fault: cases[0] for fault, cases in faults.items() if cases},
        "notes": (*listing.notes, *notes),
    }
    duplicates = source.duplicates or "by id"
    asked = [each for each in texts if not source.languages or each in source.languages]
    columns = {each: np.array(pairs[each], np.int64).reshape(-1, 3) for each in asked}
    return RetrievalPairs(
        images=Images(listing.read, np.array([positions[each] for each in kept], np.int64)),
        image_names=kept,
        # Images that are files of their own are named by their paths.
        addresses=[] if listing.looked_in else [f"{path}#{each}" for each in kept],
        texts={
            each: Texts(
                texts=[text.lower().translate(_PLAIN_QUOTES) for text in texts[each]]
                if source.lower_case
                else texts[each],
                matches=correct_pairs(texts[each], columns[each][:, :2], duplicates),
            )
            for each in asked
        },
        duplicates=duplicates,
        cleaning="line ends removed"
        + ("; part-of-speech tags removed and words joined" if tagged else "")
        + ("; lower case, plain quotation marks" if source.lower_case else ""),
        kind=kind,
        split=listing.split,
        findings={key: value for key, value in findings.items() if value},
        translations=translations_of(columns) if listing.translated else {},
    )


_Pair = tuple[int, int, int]
"""A caption's place among those of its language, its image's place, and its turn."""


def _by_language(
    rows: Iterable[tuple[Row, str, str]], positions: Mapping[str, int], places: Mapping[str, int]
) -> tuple[dict[str, list[str]], dict[str, list[_Pair]], list[str], list[str]]:
    """Return texts and pairs by language, and the empty captions and those of unknown images."""
    texts: dict[str, list[str]] = {}
    pairs: dict[str, list[_Pair]] = {}
    turns: Counter[tuple[str, str]] = Counter()
    empty: list[str] = []
    unknown: list[str] = []
    for row, text, language in rows:
        ids = dict.fromkeys(row.image_ids)
        # Captions that are left out take their turn too: the n-th stays the n-th.
        turn = {each: turns[language, each] for each in ids}
        turns.update((language, each) for each in ids)
        if not text.strip():
            empty.append(row.place)
            continue
        strangers = [each for each in ids if each not in positions]
        if strangers or not ids:
            found = repr(strangers[0]) if strangers else "which names no image"
            unknown.append(f"{row.place}, {found}")
        if known := [each for each in ids if each in places]:
            own = texts.setdefault(language, [])
            pairs.setdefault(language, []).extend(
                (len(own), places[each], turn[each]) for each in known
            )
            own.append(text)
    return texts, pairs, empty, unknown


def _check(
    faults: Mapping[str, Sequence[str]],
    *,
    images: int,
    captions: int,
    source: RetrievalSource,
    name: str,
) -> None:
    """Refuse a benchmark if too much is missing; duplicates are only reported."""
    allowed = _ALLOWED_SHARE if source.allowed_share is None else source.allowed_share
    samples = images + len(faults["unusable_samples"])
    totals = {
        "missing_images": images, "unusable_samples": samples,
        "unknown_ids": captions, "empty_captions": captions,
    }  # fmt: skip
    words = {
        "missing_images": "images are not on the disk",
        "unusable_samples": "samples cannot be used",
        "unknown_ids": "captions name an image that is not listed",
        "empty_captions": "captions are empty",
    }
    beyond = [
        f"{len(cases)} of {totals[fault]} {words[fault]} (first: {cases[0]})"
        for fault, cases in faults.items()
        if len(cases) > allowed * totals[fault]
    ]
    if beyond:
        raise DataError(f"{name}: {'; '.join(beyond)}; exceeds allowed_share {allowed:.1%}")


def _languages(
    rows: Sequence[Row], texts: Sequence[str], source: RetrievalSource
) -> tuple[list[str], list[str]]:
    """Return the language of each row, and what is worth knowing of it."""
    named = languages_of({row.language for row in rows if row.language})
    unnamed = [text for row, text in zip(rows, texts, strict=True) if not row.language]
    if not unnamed:
        if source.language and rows:
            raise DataError(
                f"{shown(source.path)} names the languages of all its captions: "
                f"{', '.join(named)}; expected no language, found {source.language!r}"
            )
        return [named[row.language] for row in rows], []
    language, notes = source.language, []
    if not language:
        language, note = recognised_language(unnamed, source.file.name)
        notes = [note]
    return [named[row.language] if row.language else language for row in rows], notes


def recognised_language(texts: Iterable[str], name: str) -> tuple[str, str]:
    """Return `zh` or `en` by the script that most texts are in, and a note that says so."""
    counts = Counter(language_by_script(text) for text in texts if text.strip())
    zh, en = (counts[language] / max(1, counts.total()) for language in ("zh", "en"))
    note = f"{name}: {zh:.0%} of the captions are in Han characters, {en:.0%} in Latin letters"
    if zh >= MOST:
        return "zh", f"{note}; taken for Chinese"
    if en >= MOST:
        return "en", f"{note}; taken for English"
    raise DataError(
        f"{note}, which is clearly neither zh nor en; give the language of its captions: "
        "--language LANGUAGE, or language in a file of --config"
    )


def _texts_without_tags(rows: Sequence[Row]) -> list[str]:
    """Remove tags, language by language, before a language is recognised by the letters."""
    texts = [row.text for row in rows]
    for language in {row.language for row in rows}:
        places = [place for place, row in enumerate(rows) if row.language == language]
        cleaned = without_tags([texts[place] for place in places])
        for place, text in zip(places, cleaned, strict=True):
            texts[place] = text
    return texts


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
