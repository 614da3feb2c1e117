"""The options by which evaluation verbs are told what to ask: benchmarks, and how to read them."""

import difflib
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from vlm.errors import ConfigError
from vlm.evaluation.config import DuplicatePolicy, RetrievalSource
from vlm.evaluation.retrieval.sources import FOLDER_SPLIT, sources_of

_SETTINGS = tuple(RetrievalSource.__dataclass_fields__)
_COMMON = tuple(name for name in _SETTINGS if name not in ("path", "name", "kind"))
_ENTRIES = "texts NAME=PATH or PATH, or mappings with path"
_LISTS = {
    "data": _ENTRIES,
    "languages": "texts such as zh",
    "where": "conditions such as source=noto",
    "index": "texts such as HNSW32",
}
"""The options that are lists, and what of."""
_FLAGS = ("lower_case", "sweep", "json")


def add_source_arguments(
    parser: ArgumentParser, *, many: bool, folder_split: str = FOLDER_SPLIT
) -> None:
    """Declare which benchmarks are asked, and how.

    Args:
        parser: Gets the options.
        many: Whether several may be given; in a file of `--config`, which the verb declares as
            `SourcesFile`, each may then be a mapping with settings of its own.
        folder_split: The split of a data folder for which none is given.
    """
    if many:
        parser.add_argument(
            "--data", type=_SourceEntry(), nargs="+", default=["data/emoji"], metavar="[NAME=]PATH",
            help="data folders, or the files of published benchmarks; a name is what scores are "
            f"called by. In a file of --config also mappings with {', '.join(_SETTINGS)}",
        )  # fmt: skip
    else:
        parser.add_argument(
            "--data", type=str, default="data/emoji", metavar="[NAME=]PATH",
            help="one data folder, or the files of one published benchmark",
        )  # fmt: skip
    parser.add_argument(
        "--split", type=str | None, default=None,
        help=f"split to ask; default: of a data folder {folder_split}, else the only one or test",
    )  # fmt: skip
    parser.add_argument(
        "--language", type=str | None, default=None,
        help="of a benchmark: language of captions whose file does not name it; default: "
        "recognised from their letters",
    )  # fmt: skip
    parser.add_argument(
        "--languages", nargs="+", default=None,
        help="languages to ask in; default: all, of a data folder the bundle's",
    )  # fmt: skip
    parser.add_argument(
        "--where", nargs="+", default=[],
        help="of a data folder: conditions on samples, such as source=noto group!=flags",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=Path | None, default=None,
        help="of a benchmark: the folder of its images, where they are not beside its file",
    )  # fmt: skip
    parser.add_argument(
        "--duplicates", type=DuplicatePolicy | None, default=None,
        help="of a benchmark: which images are right where several have the same caption; "
        f"default: {get_args(DuplicatePolicy)[0]}",
    )  # fmt: skip
    parser.add_argument(
        "--lower_case", action="store_true",
        help="of a benchmark: captions in lower case, as Chinese-CLIP and M2-Encoder evaluate",
    )  # fmt: skip
    parser.add_argument(
        "--allowed_share", type=float | None, default=None,
        help="of a benchmark: share of images and captions that may be missing or damaged; "
        "default: 0.01",
    )  # fmt: skip


def sources(options: Any, *, folder_split: str = FOLDER_SPLIT) -> list[RetrievalSource]:
    """Return the benchmarks that the options name; one without a setting takes the verb's.

    Args:
        options: What `add_source_arguments` declared, parsed.
        folder_split: As for `add_source_arguments`.

    Raises:
        ConfigError: two benchmarks have one name, or one has no path.
    """
    given = options.data if isinstance(options.data, list) else [options.data]
    return sources_of(
        [entry if isinstance(entry, str) else _source_of(entry) for entry in given],
        common={name: getattr(options, name) for name in _COMMON},
        folder_split=folder_split,
    )


class SourcesFile(ActionConfigFile):
    """The option `--config` of verbs with many sources; checks its lists and flags.

    The parser itself would take a text for a list of letters, a mapping for one of its keys, and
    any text for a flag that is set.
    """

    def __call__(
        self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Read the file.

        Raises:
            ConfigError: an option that takes a list, or true or false, has something else, or an
                entry of `data` is no benchmark.
        """
        try:
            record = yaml.safe_load(Path(values).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            record = None  # the parser says it better
        if isinstance(record, dict):
            _check_lists(record, name=str(values))
            for key in _FLAGS:
                if not isinstance(record.get(key, False), bool):
                    found = f"{values}: {key} is {record[key]!r}"
                    raise ConfigError(f"{found}; expected true or false")
        reading: Any = super()  # which carries no types
        reading.__call__(parser, namespace, values, option_string)


def _check_lists(record: Mapping[str, Any], *, name: str) -> None:
    """Refuse what a list of texts is expected to be and is not; `languages` may be null."""
    for key, what in _LISTS.items():
        value = record.get(key, [])
        if value is None and key == "languages":
            continue
        entries = value if isinstance(value, list) and key != "data" else []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in entries):
            raise ConfigError(f"{name}: {key} is {value!r}; expected a list of {what}")


class _SourceEntry:
    """Checks an entry of `--data` and gives it back as it is, for `--print_config`."""

    def __repr__(self) -> str:
        return "str | mapping"  # as the help names the type

    def __call__(self, value: object) -> object:
        if isinstance(value, Mapping):
            _source_of(value)
        elif not isinstance(value, str):
            raise ConfigError(f"data has the entry {value!r}; expected {_ENTRIES}")
        return value


def _source_of(entry: Mapping[str, Any]) -> RetrievalSource:
    """Read a mapping as any setting is read, so that types are checked and messages alike."""
    for key in entry:
        if key not in _SETTINGS:
            near = difflib.get_close_matches(str(key), _SETTINGS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(_SETTINGS)}"
            raise ConfigError(f"a benchmark in data has no setting {key!r}; {hint}")
    if "path" not in entry:
        raise ConfigError(f"a benchmark in data has no path; found {', '.join(entry)}")
    _check_lists(
        {key: entry[key] for key in ("languages", "where") if entry.get(key) is not None},
        name=f"the benchmark {entry['path']} in data",
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RetrievalSource, as_group=False)
    return RetrievalSource(**vars(parser.instantiate(parser.parse_object(dict(entry)))))
