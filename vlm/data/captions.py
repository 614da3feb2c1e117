"""Captions of one language in a stream, from what training reads and from plain texts."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from vlm.data.config import CACHE_GIB, DEFAULT_SPLIT, SourceConfig
from vlm.data.copies import local_copy, node_cache
from vlm.data.fields import captions_of, no_caption, own_fields
from vlm.data.layout import TABLE_SUFFIXES, NoSamplesError, ShardFile, layout_of, local_state
from vlm.data.scanning import records_in
from vlm.errors import DataError
from vlm.records.tars import TAR_SUFFIXES
from vlm.records.texts import Advance, lines_of, listed, paragraphs_of
from vlm.storage.places import expand, is_remote, shown, state_of
from vlm.text.scripts import MOST, language_by_script

_PAGE_SUFFIXES = (".html", ".html.gz")
_TEXT_SUFFIXES = (".txt", ".txt.gz", *_PAGE_SUFFIXES)
SUFFIXES = (*_TEXT_SUFFIXES, *TAR_SUFFIXES, *TABLE_SUFFIXES)
_FIRST = 100  # captions of a file by whose scripts those without a language are judged
_BY_SCRIPT = " by script"

logger = logging.getLogger(__name__)


def read_captions(
    sources: Sequence[str | Path],
    language: str,
    *,
    column: str = "",
    split: str = DEFAULT_SPLIT,
    progress: bool = False,
) -> Iterator[str]:
    """Give every caption of one language, source by source, as it is written there.

    Blank captions are left out and repeated ones are not. A source is anything that training reads,
    where no image is needed; a `.txt` with a caption a line; an `.html` page; or a folder without
    samples, whose texts and tables are all read, in sorted order and recursively.

    The lines of texts are in the language asked for. A caption elsewhere whose language is not
    named is too if most of the first of its file are by their script; else its own script decides.

    Args:
        sources: Paths, patterns and URLs.
        language: Code of the language, such as `zh`.
        column: The field with the captions in the language; by default it is found by its name. A
            record without it may have `captions` by language.
        split: The split to read where there are several.
        progress: Show a bar on stderr, which counts the bytes of files.

    Raises:
        DataError: when called, a source is missing or nothing that can be read; while iterating, a
            file is damaged, not UTF-8 or has no captions; at the end, none is in the language.
        PlaceError: a place cannot be reached, or its files not be kept here.
    """
    if not sources:
        raise DataError(f"no source of captions in {language!r}; expected files or folders")
    names = list(map(str, sources))
    captions = {language: (column,)} if column else {}
    configs = [SourceConfig(path=name, split=split, captions=captions) for name in names]
    try:
        files = [(file, config) for config in configs for file in _files_of(config)]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    return _stream(files, names, language, progress=progress)


def _files_of(config: SourceConfig) -> list[ShardFile]:
    path = config.path.removeprefix("file://")
    if shown(path).lower().endswith(_TEXT_SUFFIXES):
        return [_file(found) for found in expand(path)]
    if is_remote(path) or path.lower().endswith(SUFFIXES) or not Path(path).exists():
        return list(layout_of(config).files)
    files = list(_files_below(Path(path), config)) if Path(path).is_dir() else []
    if not files:
        raise DataError(
            f"{path} is nothing with captions; expected a folder of images with captions, or files "
            f"of one of {', '.join(SUFFIXES)}"
        )
    return files


def _files_below(folder: Path, config: SourceConfig) -> Iterator[ShardFile]:
    try:
        yield from layout_of(replace(config, path=str(folder))).files
        return
    except NoSamplesError:
        visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    for path in visible:
        if path.is_dir() and not path.is_symlink():  # a link could lead back here
            yield from _files_below(path, config)
        elif path.is_file() and path.name.lower().endswith(SUFFIXES):
            yield _file(str(path))


def _file(path: str) -> ShardFile:
    state = state_of(path) if is_remote(path) else local_state(path)
    return ShardFile(path=path, size=state["bytes"], state=state)


def _stream(
    files: Sequence[tuple[ShardFile, SourceConfig]],
    names: Sequence[str],
    language: str,
    *,
    progress: bool,
) -> Iterator[str]:
    found: Counter[str] = Counter()
    with tqdm(
        total=sum(file.size for file, _ in files), unit="B", unit_scale=True, unit_divisor=1024,
        desc=f"captions in {language}", disable=not progress,
    ) as bar:  # fmt: skip
        for file, config in files:
            end = bar.n + file.size
            with local_copy(file, node_cache(CACHE_GIB)) as path:
                for of, text in _captions_in(file, path, config, language, bar.update):
                    found[of] += 1
                    if of == language:
                        yield text
            bar.update(max(0, end - bar.n))  # what needed no reading, such as images
    if left_out := sum(number for of, number in found.items() if of.endswith(_BY_SCRIPT)):
        logger.warning(
            "left out %d captions whose script says another language than %s; `--column FIELD` "
            "takes all that are in a field", left_out, language,
        )  # fmt: skip
    if not found[language]:
        others = ", ".join(f"{number} in {of}" for of, number in found.items()) or "none"
        raise DataError(f"{listed(names)} hold no caption in {language!r}; found {others}")


def _captions_in(
    file: ShardFile, path: Path, config: SourceConfig, language: str, advance: Advance
) -> Iterator[tuple[str, str]]:
    """Give the captions of a file, each after its language."""
    if file.name.lower().endswith(_TEXT_SUFFIXES):
        is_page = file.name.lower().endswith(_PAGE_SUFFIXES)
        texts = paragraphs_of(path, advance=advance) if is_page else lines_of(path, advance=advance)
        yield from ((language, text) for _, text in texts if text.strip())
        return
    captions = _captions_of_records(file, path, config, language, advance)
    first = list(islice(captions, _FIRST))
    scripts = Counter(language_by_script(text) for of, text in first if not of)
    mostly = scripts[language] >= MOST * scripts.total() > 0
    for of, text in chain(first, captions):
        script = "" if of or mostly else language_by_script(text)
        if script in ("", language):
            yield of or language, text
        else:
            yield f"{script}{_BY_SCRIPT}", text


def _captions_of_records(
    file: ShardFile, path: Path, config: SourceConfig, language: str, advance: Advance
) -> Iterator[tuple[str, str]]:
    """Give the captions of records, each after its language, or after '' if nothing names it."""
    is_table = not (file.is_tar or file.images)
    if not is_table:
        nested = {of: (*fields, f"json.{fields[0]}") for of, fields in config.captions.items()}
        config = replace(config, captions=nested)
    lacking, is_captioned = "", False
    for where, record in records_in(path, file.images, config, with_images=False, advance=advance):
        if is_table and str(record.get("split") or config.split) != config.split:
            continue
        captions = captions_of(record, config, where)
        if not captions and "captions" in own_fields(record):
            captions = captions_of(record, replace(config, captions={}), where)
        lacking = lacking or str(no_caption(record, config, where))
        is_captioned = is_captioned or bool(captions)
        if language in captions:
            captions.pop("", None)  # they are most often the same again
        for of, texts in captions.items():
            yield from ((of, text) for text in texts)
    if lacking and not is_captioned:
        raise DataError(f"no sample of {file.name} has a caption: {lacking}")
