"""Plots of an evaluation: images of the right shape, drawn from what was measured."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm.evaluation.retrieval.comparison import CosineStatistics, Spread
from vlm.evaluation.retrieval.metrics import NOT_FOUND
from vlm.reports import plots
from vlm.reports.plots import cosines_png, recall_curves_png


def ranks(seed, queries=50):
    found = np.random.default_rng(seed).integers(1, 400, queries)
    return {"text_to_image": found, "image_to_text": found[::2]}


def spread(mean):
    return Spread(count=9, mean=mean, std=0.05, min=mean - 0.2, max=mean + 0.2)


NOTHING = Spread(count=0, mean=np.nan, std=np.nan, min=np.nan, max=np.nan)


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures as they are turned into images."""
    drawn, as_png = [], plots.figure_png

    def collect(figure):
        drawn.append(figure)
        return as_png(figure)

    monkeypatch.setattr(plots, "figure_png", collect)
    return drawn


@pytest.mark.slow
def test_a_recall_curve_goes_through_the_recalls(figures):
    found = {"zh": ranks(0), "en": ranks(1)}
    with Image.open(io.BytesIO(recall_curves_png({"a": found, "中文 $x": found}))) as image:
        assert image.width > 800
    axes = figures[0].axes[0]
    assert len(axes.lines) == 4
    k, recalls = axes.lines[0].get_data()
    for at in (1, 7, 100, 399):
        drawn = [recall for place, recall in zip(k, recalls, strict=True) if place <= at][-1]
        assert drawn == pytest.approx((found["zh"]["text_to_image"] <= at).mean())


def test_queries_that_found_nothing_never_rise(figures):
    lost = np.array([1, 3, NOT_FOUND, NOT_FOUND])
    recall_curves_png({"a": {"en": {"text_to_image": lost, "image_to_text": lost}}})
    assert figures[0].axes[0].lines[0].get_ydata().tolist() == [0.25, 0.5]


def test_cosines_are_drawn_for_every_benchmark_and_language(figures):
    both = CosineStatistics(correct=spread(0.5), wrong=spread(0.0))
    correct_only = CosineStatistics(correct=spread(0.5), wrong=NOTHING)
    png = cosines_png({"a": {"zh": both, "en": correct_only}, "b": {"en": both}})
    with Image.open(io.BytesIO(png)) as image:
        assert image.height > 100
    lines = figures[0].axes[0].lines
    assert len(lines) == 3 * 3  # nothing is drawn of pairs that are not there
    assert lines[0].get_xdata() == pytest.approx([0.3, 0.7])
    assert lines[1].get_xdata() == pytest.approx([0.45, 0.55])
