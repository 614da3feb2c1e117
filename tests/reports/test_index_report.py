"""The report of indexes holds every comparison, what they cost, and the plot of a sweep."""

import numpy as np
import pytest

from vlm.evaluation.config import IndexPlan
from vlm.evaluation.indexes import compare_indexes
from vlm.reports.document import Bullets, Figure, Table, write_report
from vlm.reports.index_report import index_blocks, index_document


def unit_vectors(rng, rows):
    vectors = rng.normal(size=(rows, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def report_of(plan, *, languages=("zh", "en")):
    rng = np.random.default_rng(0)
    images = unit_vectors(rng, 60)
    pairs = np.stack([np.arange(60)] * 2, axis=1)
    texts = {language: (images + 0.1 * unit_vectors(rng, 60), pairs) for language in languages}
    return compare_indexes(images, texts, plan, device="cpu")


@pytest.fixture(scope="module")
def swept():
    # One bit for a whole vector tells no image from the others.
    return report_of(IndexPlan(factories=["HNSW8", "PQ1x1"], sweep=True, memory="512MiB"))


def of_kind(blocks, kind):
    return [block for block in blocks if isinstance(block, kind)]


@pytest.mark.usefixtures("undrawn")
def test_the_table_has_every_comparison(swept):
    (table,) = of_kind(index_blocks(swept, name="emoji", number=2), Table)
    assert [row[:2] for row in table.rows] == [
        [each.factory, each.search] for each in swept.comparisons
    ]
    assert len(table.rows) == 2 * 5
    assert table.caption == "emoji"


@pytest.mark.usefixtures("undrawn")
def test_losses_stand_below_the_table(swept):
    (warnings,) = of_kind(index_blocks(swept, name="emoji"), Bullets)
    assert warnings.items == swept.warnings
    assert any("PQ1x1 costs" in warning for warning in warnings.items)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("number", "name"), [(None, "index.png"), (2, "index_2.png")])
def test_the_plot_of_a_sweep_is_numbered_where_there_are_several(swept, number, name):
    (plot,) = of_kind(index_blocks(swept, name="emoji", number=number), Figure)
    assert plot.name == name
    assert plot.alt.endswith("on emoji")


def test_exact_indexes_without_a_sweep_give_a_table_alone():
    blocks = index_blocks(report_of(IndexPlan(factories=["Flat"])), name="emoji")
    assert [type(block) for block in blocks] == [Table]


@pytest.mark.slow
def test_the_report_has_the_protocol(swept, tmp_path):
    document = index_document(swept, embeddings="runs/a/embeddings", model="a" * 64)
    page = write_report(tmp_path, document)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "index.png"}
    assert page.name == "report.html"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in (
        "`runs/a/embeddings` has 60 images of 16 dimensions", "`HNSW8`, `PQ1x1`",
        "main captions in zh, en, both ways", "Images among the other images",
        "95% of the 10 nearest neighbours; memory limit of `auto`: 512MiB", "`aaaaaaaaaaaa`",
        "median of batches", "(index.png)",
    ):  # fmt: skip
        assert part in text


def test_images_without_captions_are_searched_with_images_only(tmp_path):
    report = report_of(IndexPlan(factories=["Flat"]), languages=())
    write_report(tmp_path, index_document(report, embeddings="e", model="a"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "captions" not in text
    assert "Images among the other images" in text
