"""Approximate beside exact search in one call: what to compare, and the report of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from vlm.errors import ConfigError
from vlm.evaluation.indexes.cases import BATCH, cases_of
from vlm.evaluation.indexes.sweep import Comparison, SweepPoint, compare_all, loss_of, sweep
from vlm.evaluation.retrieval.scores import Ranks
from vlm.search.approximate import check_factory
from vlm.search.index_choice import AUTO

_KS = (1, 5, 10)  # the numbers of answers that are looked at
_MOST = max(_KS)
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_TIMING = f"median of batches of {BATCH} queries, one thread, {_MOST} answers"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexPlan:
    """Which indexes to put beside exact search."""

    factories: Sequence[str] = (AUTO,)
    """Strings for FAISS's index_factory such as HNSW32 or IVF64,SQ8, with @nprobe=8 where a
    parameter is not to be tuned; auto is chosen by size, memory and recall."""
    target_recall: float = 0.95
    """Share of the ten nearest neighbours to which search parameters are tuned."""
    memory: str = "1GiB"
    """What an index chosen by auto may take, such as 512MiB or 2GB."""
    sweep: bool = False
    """Also measure each index over its search parameter."""

    def __post_init__(self) -> None:
        if not self.factories:
            raise ConfigError(f"no index is to be compared; expected some, such as {AUTO}")
        if not 0 < self.target_recall <= 1:
            raise ConfigError(
                f"target_recall is {self.target_recall}; expected more than 0 and up to 1"
            )
        bytes_in(self.memory)  # a size that cannot be read is told before anything is embedded

    def check(self, dim: int) -> None:
        """Refuse indexes that FAISS does not know for vectors of this width.

        Raises:
            SearchIndexError: as `check_factory`.
        """
        for factory in self.factories:
            if factory != AUTO:
                check_factory(factory, dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """What indexes make of searches, and what exact search does."""

    plan: IndexPlan
    images: int
    dim: int
    comparisons: Sequence[Comparison]
    """By index, then by search."""
    curves: Mapping[str, Mapping[str, Sequence[SweepPoint]]]
    """By the names of the search and of the index, the points of a sweep; empty without one."""
    exact_milliseconds: Mapping[str, float]
    """By search, the time of an exact one a query."""

    @property
    def k(self) -> int:
        """The largest number of answers that was looked at; that of `ann_recall` in the curves."""
        return _MOST

    @property
    def warnings(self) -> list[str]:
        """Return a sentence for each search in which an index costs recall or misses the target."""
        said = []
        for each in self.comparisons:
            if loss := loss_of(each):
                said.append(loss)
            if not each.reached_target:
                said.append(
                    f"no search parameter brings {each.factory} to a recall of "
                    f"{self.plan.target_recall} in {each.search}; what does best is used"
                )
        return said

    def as_record(self) -> dict[str, Any]:
        """Return it as plain dictionaries, for JSON."""
        return {
            "target_recall": self.plan.target_recall,
            "timing": _TIMING,
            "comparisons": [asdict(each) for each in self.comparisons],
            "sweep": {
                search: {name: [asdict(point) for point in line] for name, line in lines.items()}
                for search, lines in self.curves.items()
            },
        }


def compare_indexes(
    images: Float32[np.ndarray, "images dim"],
    texts: Mapping[str, tuple[Float32[np.ndarray, "_ dim"], Int[np.ndarray, "_ 2"]]],
    plan: IndexPlan,
    *,
    ranks: Mapping[str, Ranks] | None = None,
    device: str | None = None,
) -> IndexReport:
    """Build indexes and put them beside exact search, in both directions of every language.

    Args:
        images: Unit vectors.
        texts: By language, unit vectors and the pairs (text, image) that belong together.
        plan: What to compare.
        ranks: By language, the exact ranks, where they are known.
        device: As for `build_index`; exact ranks are found there as well.

    Raises:
        SearchIndexError: there is nothing to search with or in, FAISS cannot make an index, or
            none that `auto` knows fits into the memory.
    """
    cases = cases_of(images, texts, ks=_KS, ranks=ranks, device=device)
    comparisons: list[Comparison] = []
    curves: dict[str, dict[str, list[SweepPoint]]] = {}
    for index, case, comparison in compare_all(
        cases,
        plan.factories,
        ks=_KS,
        target_recall=plan.target_recall,
        memory_budget_bytes=bytes_in(plan.memory),
        device=device,
    ):
        comparisons.append(comparison)
        if plan.sweep:
            points = sweep(index, case, k=_MOST)
            curves.setdefault(case.name, {})[comparison.factory] = points
    return IndexReport(
        plan=plan,
        images=len(images),
        dim=images.shape[1],
        comparisons=comparisons,
        curves=curves,
        exact_milliseconds={case.name: case.exact_milliseconds for case in cases},
    )


def comparison_rows(comparisons: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Return the header of a table, and a row for each index, direction and language.

    The first two columns are text.
    """
    header = [
        "factory", "search", "R@1 exact, index", "R@10 exact, index",
        "ann_recall@10", "ms exact, index", "bytes each", "build s", "parameters",
    ]  # fmt: skip
    return header, [_row(each) for each in comparisons]


def bytes_in(size: str) -> int:
    """Read a size as people write it: a number of bytes, or one with KB, MiB and so on.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", size.strip(), re.IGNORECASE)
    count = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if not count:
        raise ConfigError(
            f"memory is {size!r}; expected a number of bytes above 0, or one with KB, MB, GB, KiB, "
            "MiB or GiB, such as 512MiB"
        )
    return count


def _row(each: Comparison) -> list[str]:
    recalls = [
        f"{each.exact_recall[k]:.3f}, {each.index_recall[k]:.3f}" if each.exact_recall else "-"
        for k in (1, 10)
    ]
    parameters = " ".join(f"{name}={value:g}" for name, value in each.parameters.items())
    return [
        each.factory, each.search, *recalls,
        f"{each.ann_recall[10]:.3f}",
        f"{each.exact_milliseconds_per_query:.4f}, {each.milliseconds_per_query:.4f}",
        f"{each.bytes_per_vector:.0f}", f"{each.build_seconds:.3f}", parameters or "-",
    ]  # fmt: skip
