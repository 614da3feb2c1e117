"""Indexes are compared with exact search in one call, whose report says what they cost."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.evaluation.test_indexes import two_kinds
from vlm.errors import ConfigError, SearchIndexError
from vlm.evaluation.config import IndexPlan
from vlm.evaluation.indexes import cases_of, compare_indexes, compare_with_exact
from vlm.reports.index_report import comparison_rows
from vlm.search.index import VectorIndex

SEARCHES = ["en text to image", "en image to text", "image to image"]


@pytest.fixture(scope="module")
def vectors():
    images, texts, matches = two_kinds()
    return images, {"en": (texts, matches)}


@pytest.fixture(scope="module")
def report(vectors):
    plan = IndexPlan(factories=["IVF16,Flat", "auto"], target_recall=0.8, sweep=True)
    return compare_indexes(*vectors, plan, device="cpu")


def test_every_index_stands_beside_exact_search_in_every_search(report, vectors):
    found = [(each.factory, each.search) for each in report.comparisons]
    assert found == [(f, search) for f in ("IVF16,Flat", "auto: Flat") for search in SEARCHES]
    assert (report.images, report.dim, report.k) == (400, 24, 10)
    assert list(report.exact_milliseconds) == SEARCHES
    assert min(report.exact_milliseconds.values()) > 0
    for case, each in zip(cases_of(*vectors), report.comparisons[:3], strict=True):
        index = VectorIndex.build(case.candidates, "IVF16,Flat")
        expected = compare_with_exact(index, case, target_recall=0.8)
        assert (each.exact_recall, each.ann_recall) == (
            expected.exact_recall, expected.ann_recall,
        )  # fmt: skip
    for each in report.comparisons[3:]:
        assert each.index_recall == each.exact_recall


def test_a_sweep_is_there_where_it_is_asked_for(report, vectors):
    assert list(report.curves) == SEARCHES
    for curves in report.curves.values():
        assert [point.value for point in curves["IVF16,Flat"]] == [1, 2, 4, 8, 16]
        assert [point.value for point in curves["auto: Flat"]] == [None]
    plain = compare_indexes(*vectors, IndexPlan(factories=["Flat"]), device="cpu")
    assert plain.curves == {}


def test_the_record_is_json_with_all_numbers(report):
    record = json.loads(json.dumps(report.as_record()))
    assert record["target_recall"] == 0.8
    assert [each["search"] for each in record["comparisons"]] == SEARCHES * 2
    assert record["comparisons"][0]["ann_recall"] == {
        str(k): recall for k, recall in report.comparisons[0].ann_recall.items()
    }
    assert [p["value"] for p in record["sweep"]["image to image"]["IVF16,Flat"]] == [1, 2, 4, 8, 16]


def test_what_costs_recall_or_misses_its_target_is_warned_of(report):
    assert report.warnings == []
    first = report.comparisons[0]
    costly = replace(first, exact_recall={1: 0.5}, index_recall={1: 0.47})
    missing = replace(first, reached_target=False)
    assert replace(report, comparisons=[costly, missing]).warnings == [
        "IVF16,Flat costs 3.0 points of R@1 in en text to image: 0.470, and 0.500 by exact search",
        "no search parameter brings IVF16,Flat to a recall of 0.8 in en text to image; what does "
        "best is used",
    ]


def test_rows_say_what_the_comparisons_do(report):
    header, rows = comparison_rows(report.comparisons)
    assert {len(row) for row in rows} == {len(header)}
    row, first = dict(zip(header, rows[0], strict=True)), report.comparisons[0]
    assert (row["factory"], row["search"]) == ("IVF16,Flat", "en text to image")
    for k in (1, 10):
        recalls = f"{first.exact_recall[k]:.3f}, {first.index_recall[k]:.3f}"
        assert row[f"R@{k} exact, index"] == recalls
    assert row["parameters"] == f"nprobe={first.parameters['nprobe']}"
    alone = dict(zip(header, rows[2], strict=True))
    assert (alone["R@1 exact, index"], alone["R@10 exact, index"]) == ("-", "-")
    assert dict(zip(header, rows[-1], strict=True))["parameters"] == "-"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"memory": "much"}, "memory is 'much'; expected a number of bytes above 0"),
        ({"memory": "0"}, "memory is '0'; expected a number of bytes above 0"),
        ({"target_recall": 0.0}, "target_recall is 0.0; expected more than 0 and up to 1"),
        ({"target_recall": 1.5}, "target_recall is 1.5; expected more than 0 and up to 1"),
        ({"factories": ()}, "no index is to be compared; expected some, such as auto"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_followed_is_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        IndexPlan(**setting)


def test_the_memory_bounds_what_auto_chooses(vectors):
    plan = IndexPlan(memory="1KiB")
    with pytest.raises(SearchIndexError, match="fits into 1024 bytes; expected at least"):
        compare_indexes(*vectors, plan, device="cpu")


def test_images_alone_are_searched_among_themselves(vectors):
    report = compare_indexes(vectors[0], {}, IndexPlan(factories=["Flat"]), device="cpu")
    assert [each.search for each in report.comparisons] == ["image to image"]
    nothing = np.empty((0, 24), np.float32)
    with pytest.raises(SearchIndexError, match="with 0 images"):
        compare_indexes(nothing, {}, IndexPlan(), device="cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 2**30), ("1.5kb", 1500), ("512 MiB", 2**29), ("77", 77), ("2gb", 2 * 10**9)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert IndexPlan(memory=text).memory_bytes == size
