"""Captions of one language, streamed from text files, tables, JSON lines and shards of any size."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from vlm.data.caption_files import DAMAGE, READERS, SHARD_SUFFIXES, Reading, listed, suffix_of
from vlm.data.manifest import MANIFEST_NAME, ShardEntry, read_manifest
from vlm.errors import DataError, TokenizerError
from vlm.files import sha256_of


def read_captions(
    sources: Sequence[Path],
    language: str,
    *,
    column: str = "",
    split: str = "train",
    progress: bool = False,
) -> Iterator[str]:
    """Give every caption of one language, source by source, as it is written there.

    However large a source is, only a block of it is in memory. Blank captions are left out and
    repeated ones are not. A source is one of

    * `.txt`, a caption a line, and tables with a header, `.csv` and `.tsv`, each also with `.gz`;
    * `.parquet`, whose column may hold lists;
    * `.jsonl` and `.jsonl.gz`, a record a line, whose value may be a list of captions;
    * `.html`, whose paragraphs, headings, items and cells are texts, without navigation;
    * shards, `.tar` and `.tar.gz`: their `.json` records, or `.txt` members where a sample's
      record names no captions or is not there;
    * a data folder: the shards of its split, each verified before it is read;
    * any other folder: all of the above in it and in its folders, sorted. Hidden files and links
      to folders are left out.

    Text is UTF-8. Tables and records name their captions by the first of: the language code,
    `caption_LANGUAGE`, `caption`, `text`; records also by `captions`, a mapping by language, which
    goes before these. What says nothing of its language is taken to be in the one asked for.

    Args:
        sources: Files and folders.
        language: Code of the language, such as `zh`.
        column: The column of tables and key of records to read instead of those above.
        split: The split to read of data folders.
        progress: Show a bar on stderr, which counts the bytes of files as they lie on the disk.

    Raises:
        TokenizerError: when called, a source is missing or nothing that can be read; while
            iterating, a file is damaged, not UTF-8 or names no captions; at the end, the sources
            hold no caption in the language.
    """
    if not sources:
        raise TokenizerError(f"no source of captions in {language!r}; expected files or folders")
    files = [file for source in sources for file in _files_of(source, split)]
    return _stream(files, sources, language=language, column=column, progress=progress)


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size: int
    shard: ShardEntry | None = None
    """What a manifest says of it."""


def _stream(
    files: Sequence[_File], sources: Sequence[Path], *, language: str, column: str, progress: bool
) -> Iterator[str]:
    none_yet = True
    with tqdm(
        total=sum(file.size for file in files), unit="B", unit_scale=True, unit_divisor=1024,
        desc=f"captions in {language}", disable=not progress,
    ) as bar:  # fmt: skip
        for file in files:
            end = bar.n + file.size
            reading = Reading(
                path=file.path, size=file.size, language=language, column=column, advance=bar.update
            )
            _verify(file)
            for caption in _captions_of(reading):
                none_yet = False
                yield caption
            bar.update(max(0, end - bar.n))  # what needed no reading, as other columns
    if none_yet:
        raise TokenizerError(
            f"{listed(map(str, sources))} hold no caption in {language!r}; expected at least one"
        )


def _captions_of(reading: Reading) -> Iterator[str]:
    """Read one file; what its reader trips over becomes a sentence with the place."""
    try:
        yield from READERS[suffix_of(reading.path)](reading)
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{reading}: byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8 "
            f"({error.reason}); expected text in UTF-8"
        ) from error
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{reading}: {error.object[error.start]!a} is half a character; expected whole ones"
        ) from error
    except csv.Error as error:
        raise TokenizerError(
            f"{reading}: {error}; expected a table with quotes as in RFC 4180"
        ) from error
    except DAMAGE as error:
        after = f" after {reading.unit} {reading.place}" if reading.place else ""
        raise TokenizerError(f"{reading.path} cannot be read{after}: {error}") from error


def _files_of(source: Path, split: str) -> list[_File]:
    try:
        if source.is_dir():
            files = list(_files_in(source, split))
            if not files:
                raise TokenizerError(
                    f"{source} holds {_kinds_in(source)}; expected files of captions "
                    f"({', '.join(READERS)}) or a {MANIFEST_NAME} with shards"
                )
            return files
        if not source.exists():
            raise TokenizerError(f"{source} is missing; expected a file or folder of captions")
        if suffix_of(source) not in READERS:
            raise TokenizerError(
                f"{source} is no known kind of file; expected one of {', '.join(READERS)}"
            )
        return [_File(source, source.stat().st_size)]
    except DataError as error:
        raise TokenizerError(str(error)) from error
    except OSError as error:
        raise TokenizerError(f"{source} cannot be read: {error}") from error


def _files_in(folder: Path, split: str) -> Iterator[_File]:
    if (folder / MANIFEST_NAME).is_file():
        for entry in read_manifest(folder).shards_of(split, folder):
            yield _shard_of(folder, entry)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():  # it could lead back here
                yield from _files_in(path, split)
        elif suffix_of(path) in READERS:
            yield _File(path, path.stat().st_size)


def _shard_of(folder: Path, entry: ShardEntry) -> _File:
    path = folder / entry.name
    if not path.is_file():
        raise TokenizerError(f"shard {path} is missing; the manifest lists it")
    if suffix_of(path) not in SHARD_SUFFIXES:
        raise TokenizerError(f"{path} is no shard; expected one of {', '.join(SHARD_SUFFIXES)}")
    size = path.stat().st_size
    if size != entry.bytes:
        raise TokenizerError(
            f"shard {path} is damaged: {size} bytes, the manifest says {entry.bytes}"
        )
    return _File(path, size, entry)


def _verify(file: _File) -> None:
    """Check a shard against its manifest entry, as whoever trains on it does."""
    if file.shard is None:
        return
    try:
        found = sha256_of(file.path)
    except OSError as error:
        raise TokenizerError(f"shard {file.path} cannot be read: {error}") from error
    if found != file.shard.sha256:
        raise TokenizerError(
            f"shard {file.path} is damaged: sha256 {found[:12]}, "
            f"the manifest says {file.shard.sha256[:12]}"
        )


def _kinds_in(folder: Path) -> str:
    files = (path for path in folder.rglob("*") if path.is_file())
    kinds = {path.suffix or path.name for path in islice(files, 1000)}
    return f"only {listed(sorted(kinds))}" if kinds else "no file"
