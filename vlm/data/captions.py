"""Captions of one language, streamed from text files, tables, JSON lines and shards of any size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm.data.config import SourceConfig
from vlm.data.copies import check_unchanged
from vlm.data.layout import layout_of
from vlm.data.manifest import MANIFEST_NAME, ShardEntry
from vlm.data.records import (
    Advance,
    Member,
    languages_of,
    lines_of,
    listed,
    objects_of,
    paragraphs_of,
    quoted,
    samples_of,
    texts_in,
)
from vlm.data.scanning import TAR_SUFFIXES, record_of
from vlm.data.tables import rows_of
from vlm.errors import DataError

_ANY_LANGUAGE = ("caption", "text")
_PACKABLE = (".txt", ".csv", ".tsv", ".jsonl", ".html", ".tar")
SUFFIXES = (*_PACKABLE, *(f"{suffix}.gz" for suffix in _PACKABLE), ".parquet")


def read_captions(
    sources: Sequence[Path],
    language: str,
    *,
    column: str = "",
    split: str = "train",
    progress: bool = False,
) -> Iterator[str]:
    """Give every caption of one language, source by source, as it is written there.

    Only a block of a source is in memory. Blank captions are left out and repeated ones are not. A
    source is a file: `.txt` with a caption a line, `.csv` or `.tsv` with a header, `.jsonl` with a
    record a line, `.parquet`, `.html` (its running text) or a shard, `.tar`, whose samples have
    `.json` records or `.txt` members; all but Parquet may be packed (`.gz`). Or it is a folder: of
    a data folder the shards of one split, verified before they are read; of any other all such
    files in it and below, sorted, without hidden files and links to folders.

    Tables and records name their captions by the first of: the language code, `caption_LANGUAGE`,
    `caption`, `text`; records also by `captions`, a mapping by language, which goes before these. A
    code may have a region, `zh-CN`. Captions without a language are taken to be in the one asked
    for. A value may be a list of captions.

    Args:
        sources: Files and folders.
        language: Code of the language, such as `zh`.
        column: The column of tables and key of records to read instead of those above.
        split: The split to read of data folders.
        progress: Show a bar on stderr, which counts the bytes of files as they lie on the disk.

    Raises:
        DataError: when called, a source is missing or nothing that can be read; while iterating, a
            file is damaged, not UTF-8 or names no captions; at the end, the sources hold no caption
            in the language.
    """
    if not sources:
        raise DataError(f"no source of captions in {language!r}; expected files or folders")
    files = [file for source in sources for file in _files_of(source, split)]
    return _stream(files, sources, _Wanted(language, column), progress=progress)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Which columns and keys hold the captions that are asked for."""

    language: str
    column: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of columns and keys, the best first."""
        language = self.language
        return (self.column,) if self.column else (language, f"caption_{language}", *_ANY_LANGUAGE)

    def __str__(self) -> str:
        return " or ".join(map(repr, self.names))

    def among(self, columns: Iterable[str]) -> Sequence[str]:
        """Return the columns with the captions: several if they differ in their region only."""
        return _best_of(self.names, tuple(columns))

    def texts_of(self, record: Mapping[str, Any], place: str) -> list[str] | None:
        """Return a record's captions in the language, or None if it names none in any."""
        if isinstance(record.get("captions"), dict) and self.column not in record:
            return self._texts_in(record["captions"], place)
        names = self.among(record)
        return [text for n in names for text in self._texts_in(record[n], place)] if names else None

    def texts_of_sample(self, sample: Mapping[str, Member], place: str) -> list[str] | None:
        """Return the captions of a shard's sample, from its record or else from its text."""
        record = record_of({name: member.content for name, member in sample.items()}, place)
        texts = self.texts_of(record["json"], place) if "json" in record else None
        return record.get("txt") if texts is None else texts

    def _texts_in(self, value: object, place: str) -> list[str]:
        if not isinstance(value, dict):
            return texts_in(value, place)
        tags = [tag for tag, of in languages_of(value).items() if self.language in (tag, of)]
        return [text for tag in tags for text in texts_in(value[tag], place)]


@lru_cache  # the records of a file have the same keys, again and again
def _best_of(names: tuple[str, ...], columns: tuple[str, ...]) -> Sequence[str]:
    tags = {column: column.removeprefix("caption_") for column in columns}
    languages = languages_of(tags.values())
    plain = {column: column.removesuffix(tag) + languages[tag] for column, tag in tags.items()}
    for name in names:
        if name in columns:
            return [name]
        if found := [column for column in columns if plain[column] == name]:
            return found
    return []


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size: int
    shard: ShardEntry | None = None
    """What a manifest says of it."""


def _stream(
    files: Sequence[_File], sources: Sequence[Path], wanted: _Wanted, *, progress: bool
) -> Iterator[str]:
    none_yet = True
    with tqdm(
        total=sum(file.size for file in files), unit="B", unit_scale=True, unit_divisor=1024,
        desc=f"captions in {wanted.language}", disable=not progress,
    ) as bar:  # fmt: skip
        for file in files:
            end = bar.n + file.size
            if file.shard is not None:
                file.shard.verify(file.path)
            for caption in _captions_of(file.path, wanted, bar.update):
                if caption.strip():
                    none_yet = False
                    yield caption
            bar.update(max(0, end - bar.n))  # what needed no reading, as other columns
    if none_yet:
        raise DataError(
            f"{listed(map(str, sources))} hold no caption in {wanted.language!r}; expected at "
            "least one"
        )


def _captions_of(path: Path, wanted: _Wanted, advance: Advance) -> Iterator[str]:
    """Give the captions of one file, blank ones too."""
    suffix = suffix_of(path).removesuffix(".gz")
    if suffix in (".txt", ".html"):
        reader = lines_of if suffix == ".txt" else paragraphs_of
        yield from (text for _, text in reader(path, advance=advance))
    elif suffix in (".jsonl", ".tar"):
        yield from _captions_of_records(path, wanted, advance, packed=suffix == ".tar")
    else:

        def choose(columns: Sequence[str]) -> Sequence[str]:
            if found := wanted.among(columns):
                return found
            raise DataError(f"{path} has no column {wanted}; its columns are {quoted(columns)}")

        for place, row in rows_of(path, choose, advance=advance):
            yield from wanted.texts_of(row, f"{path}, {place}") or ()


def _captions_of_records(
    path: Path, wanted: _Wanted, advance: Advance, *, packed: bool
) -> Iterator[str]:
    """Read records; some may name no captions, but not all."""
    captioned, without = False, ""
    if packed:
        for place, (_, sample) in samples_of(path, advance=advance):
            texts = wanted.texts_of_sample(sample, f"{path}, {place}")
            captioned = captioned or texts is not None
            without = without or listed(f".{extension}" for extension in sample)
            yield from texts or ()
        expected = f"no sample has captions; expected .txt members or .json records with {wanted}"
    else:
        for place, record in objects_of(path, advance=advance):
            texts = wanted.texts_of(record, f"{path}, {place}")
            captioned = captioned or texts is not None
            without = without or quoted(record)
            yield from texts or ()
        expected = f"no record names captions; expected {wanted}"
    if without and not captioned:
        first = "sample" if packed else "record"
        raise DataError(
            f"{path}: {expected} or 'captions' by language, the first {first} has {without}"
        )


def suffix_of(path: Path) -> str:
    """Return the suffix in small letters, that of a packed file with its `.gz`."""
    name = path.name.lower()
    packed = ".gz" if name.endswith(".gz") else ""
    return Path(name.removesuffix(packed)).suffix + packed


def _files_of(source: Path, split: str) -> list[_File]:
    try:
        if source.is_dir():
            files = list(_files_in(source, split))
            if not files:
                others = (path for path in source.rglob("*") if path.is_file())
                kinds = listed(sorted({path.suffix or path.name for path in islice(others, 1000)}))
                raise DataError(
                    f"{source} holds {f'only {kinds}' if kinds else 'no file'}; expected files of "
                    f"captions ({', '.join(SUFFIXES)}) or a {MANIFEST_NAME} with shards"
                )
            return files
        if not source.exists():
            raise DataError(f"{source} is missing; expected a file or folder of captions")
        if suffix_of(source) not in SUFFIXES:
            raise DataError(
                f"{source} is no known kind of file; expected one of {', '.join(SUFFIXES)}"
            )
        return [_File(source, source.stat().st_size)]
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from error


def _files_in(folder: Path, split: str) -> Iterator[_File]:
    if (folder / MANIFEST_NAME).is_file():
        for file in layout_of(SourceConfig(path=str(folder), split=split)).files:
            check_unchanged(file)
            path = Path(file.path)
            if suffix_of(path) not in TAR_SUFFIXES:
                raise DataError(f"{path} is no shard; expected one of {', '.join(TAR_SUFFIXES)}")
            yield _File(path, file.size, file.entry)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():  # it could lead back here
                yield from _files_in(path, split)
        elif suffix_of(path) in SUFFIXES:
            yield _File(path, path.stat().st_size)
