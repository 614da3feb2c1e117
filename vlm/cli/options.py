"""The options that several verbs have, and what verbs of evaluation do with them."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.data.config import SourceConfig
from vlm.errors import ConfigError, DistributedError
from vlm.evaluation.config import (
    IndexPlan,
    RetrievalSettings,
    RetrievalSource,
    SourceSettings,
)

if TYPE_CHECKING:
    from vlm.distributed.groups import RankGroup
    from vlm.embedding.bulk import BulkEmbedder
    from vlm.reports.document import Document


@dataclass(frozen=True)
class SourceOptions(SourceConfig):
    """A source of images with captions."""

    path: str
    _: KW_ONLY
    config: Path | None = None
    """YAML file with these options."""

    def source(self) -> SourceConfig:
        """Return the source that the options describe."""
        names = [field.name for field in fields(SourceConfig)]
        return SourceConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where a model runs."""

    device: str | None = None
    """Such as cpu or cuda:0; null takes a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DeviceOptions):
    """Where a model runs, and at which width."""

    truncate_dim: int | None = None
    """Keep only the first N dimensions (a Matryoshka width of the model)."""


@dataclass(frozen=True, kw_only=True)
class JsonOptions:
    """How results are printed."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(JsonOptions):
    """Where the results of an evaluation go."""

    out: Path | None = None
    """Folder for report.html, report.md with its images, and the results as JSON."""

    def check_folders(self) -> None:
        """Refuse an `--out` or a `--cache` that cannot be a folder, before any work is done."""
        for name in ("out", "cache"):
            folder: Path | None = getattr(self, name, None)
            if folder is None:
                continue
            there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
            if not there.is_dir():
                raise ConfigError(
                    f"--{name} is {folder}, but {there} is not a folder; expected a folder or a "
                    "new name"
                )

    def deliver(
        self,
        record: Mapping[str, Any],
        *,
        record_name: str,
        document: Callable[[], "Document"],
        table: Callable[[], str],
    ) -> None:
        """Write the record and the report where `--out` says, and print the table or the JSON."""
        self.check_folders()
        text = json.dumps(record, indent=1, ensure_ascii=False)
        if self.out:
            from vlm.files import write_file
            from vlm.reports.document import write_report

            write_file(self.out / record_name, (text + "\n").encode())
            print(f"report: {write_report(self.out, document())}", file=sys.stderr)
        print(text if self.json else table())


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ReportOptions, ModelOptions):
    """The model of an evaluation, and where its vectors and results go."""

    cache: Path | None = None
    """Folder that keeps embeddings, so that an interrupted run continues where it was; null is
    the folder cache in that of out."""

    def bulk_embedder(self, bundle: Path, group: "RankGroup") -> "BulkEmbedder":
        """Load a bundle, to embed with the ranks of a group."""
        self.check_folders()
        from vlm.embedding.bulk import BulkEmbedder
        from vlm.embedding.embedder import Embedder

        return BulkEmbedder(
            Embedder.load(bundle, device=self.device, truncate_dim=self.truncate_dim),
            cache=self.cache or (self.out and self.out / "cache"),
            group=group,
            show_progress_bar=True,
        )


@dataclass(frozen=True, kw_only=True)
class IndexOptions(ReportOptions):
    """Which FAISS indexes are compared with exact search."""

    index: tuple[str, ...] = ()
    """FAISS indexes to compare with exact search: strings for index_factory such as HNSW32 or
    IVF64,SQ8, with @nprobe=8 for a parameter that is not to be tuned; auto is chosen by size,
    memory and recall."""
    target_recall: float | None = None
    """Recall of the ten nearest neighbours to which search parameters are tuned; null is 0.95."""
    memory: str | None = None
    """Memory that an index chosen by auto may take; null is 1GiB."""
    sweep: bool = False
    """Also measure each index over its search parameter, for --out or --json."""

    def index_plan(self) -> IndexPlan | None:
        """Return the comparison that is asked for; None where no index was named."""
        given = {name: getattr(self, name) for name in ("target_recall", "memory", "sweep")}
        given = {name: value for name, value in given.items() if value not in (None, False)}
        if not self.index:
            if given:
                raise ConfigError(
                    f"found {' and '.join(given)} without index; expected --index FACTORY as well"
                )
            return None
        if self.sweep and not (self.out or self.json):
            raise ConfigError("found sweep, which a table does not show; expected --out or --json")
        return IndexPlan(factories=self.index, **given)


def sources_in(
    options: SourceSettings,
    entries: Sequence[str | RetrievalSource],
    *,
    folder_split: str | None = None,
) -> list[RetrievalSource]:
    """Return the benchmarks that are asked; one without a setting takes that of the options."""
    from vlm.evaluation.retrieval.sources import sources_of

    common = {
        field.name: getattr(options, field.name)
        for field in fields(RetrievalSettings)
        if hasattr(options, field.name)
    }
    common |= {"where": list(options.where or ()), "lower_case": bool(options.lower_case)}
    return sources_of(entries, common=common, folder_split=folder_split)


def refuse_several_processes(verb: str) -> None:
    """Refuse to be one of several processes, each of which would do a verb in full."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise DistributedError(
            f"`vlm {verb}` was launched as {ranks} processes, each of which would do all of it; "
            "expected one process, started without a launcher"
        )
