"""The plot of recall against time is an image of any number of searches and indexes."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm.evaluation.indexes import SweepPoint
from vlm.reports.index_report import recall_latency_png


def point(value, recall):
    return SweepPoint(
        value=value, ann_recall=recall, recall_at_1=None, milliseconds_per_query=0.01 * (value or 1)
    )


def drawn(searches, factories):
    line = [point(1, 0.5), point(4, 0.9), point(16, 1.0)]
    curves = {f"IVF{n},Flat": line for n in range(factories)} | {"Flat": [point(None, 1.0)]}
    panels = {f"search {n}": curves for n in range(searches)}
    png = recall_latency_png(
        panels, exact_milliseconds=dict.fromkeys(panels, 0.05), k=10, title="a title"
    )
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return image


@pytest.mark.slow
@pytest.mark.parametrize(("searches", "factories"), [(1, 0), (1, 3), (5, 11)])
def test_any_number_of_searches_is_drawn(searches, factories):
    image = drawn(searches, factories)
    assert image.format == "PNG"
    assert 300 < min(image.size) <= max(image.size) < 1600
    assert np.asarray(image.convert("L")).std() > 5
