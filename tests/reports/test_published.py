"""The published rows are whole, plausible, and give their sources and protocols."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

from vlm.reports.table import published_benchmarks, published_rows

ROWS = published_rows()
ROOT = Path(__file__).parents[2]


def rows_of(benchmark, model=""):
    return [row for row in ROWS if row.benchmark == benchmark and row.model.startswith(model)]


def test_every_row_has_a_source_and_a_protocol():
    for row in ROWS:
        assert row.model
        assert row.protocol
        # A source is a public page or paper.
        assert "github.com/" in row.source or "arXiv 2" in row.source
        assert row.images >= 1000
        assert row.captions >= 1000
        assert row.language == ("en" if row.benchmark in ("flickr30k", "coco") else "zh")


def test_recalls_are_per_cent_and_grow_with_k():
    for row in ROWS:
        assert len(row.recalls) == 6
        for direction in (row.recalls[:3], row.recalls[3:]):
            known = [recall for recall in direction if recall is not None]
            assert all(0 <= recall <= 100 for recall in known)
            assert known == sorted(known)
        assert row.recalls[0] is not None


def test_printed_means_are_those_of_the_recalls():
    printed = [row for row in ROWS if row.mean_recall is not None]
    for row in printed:
        known = [recall for recall in row.recalls if recall is not None]
        # Rounded recalls bring 0.05 at most, and so does the printed mean.
        assert np.mean(known) == pytest.approx(row.mean_recall, abs=0.1), row
    assert len(printed) > 60


def test_recalls_are_fractions_of_the_captions_of_the_protocol():
    # Two decimals determine the number of queries in the denominator.
    two_decimals = [row for row in ROWS if row.source.startswith("ZH-CLIP")]
    for row in two_decimals:
        for recall in row.recalls[:3]:
            found = round(recall * row.captions / 100)
            assert abs(100 * found / row.captions - recall) < 0.0105, row
    assert {row.captions for row in two_decimals} == {5000, 1053, 5008}


def test_no_row_stands_twice():
    keys = [(row.source, row.benchmark, row.model) for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert set(published_benchmarks()) == {row.benchmark for row in ROWS}


def test_known_traps_are_recorded():
    for row in rows_of("flickr30k", "M2-Encoder"):
        assert row.captions == 1000
    for row in rows_of("flickr30k-cn", "M2-Encoder"):
        assert row.captions == 5000
    (cn_clip,) = rows_of("coco-cn", "CN-CLIP ViT-B/16")
    assert cn_clip.source.startswith("Chinese-CLIP")
    assert cn_clip.recalls[0] > cn_clip.recalls[3]  # its own table, not M2-Encoder's
    (taiyi,) = rows_of("flickr30k-cn", "Taiyi-XL")
    assert taiyi.recalls[0] < taiyi.recalls[3]
    assert "exchanged" in taiyi.note
    (altclip,) = rows_of("coco-cn", "AltCLIP-0.8B")
    assert "doubt" in altclip.note
    assert all(row.recalls[3:] == (None, None, None) for row in rows_of("muge"))


def test_images_find_one_of_five_captions_more_easily_than_a_caption_its_image():
    # Where a row has it the other way round, its directions are exchanged or its captions fewer.
    for row in ROWS:
        if row.captions == 5 * row.images:
            assert row.recalls[3] > row.recalls[0], row


def test_the_table_is_within_the_package_that_is_shipped():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["vlm"]}
    assert (ROOT / "vlm/reports/published.yaml").is_file()
