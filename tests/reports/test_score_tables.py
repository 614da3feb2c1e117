"""Scores as tables."""

import numpy as np

from vlm.reports.score_tables import format_scores, in_interval, score_rows


def scores_of_two_languages():
    scores = {
        f"{language}/{direction}/recall@{k}": value
        for language, values in (("en", (0.1, 0.5)), ("zh", (0.25, 1.0)))
        for direction, shift in (("text_to_image", 0.0), ("image_to_text", -0.1))
        for k, value in zip((1, 10), np.add(values, shift).tolist(), strict=True)
    }
    for name in [name.rsplit("/", 1)[0] for name in scores]:
        scores |= {f"{name}/median_rank": 12.5, f"{name}/mrr": 0.25}
    return scores | {"en/mean_recall": 0.25, "zh/mean_recall": 0.575}


def test_scores_become_a_table():
    assert format_scores({"val": scores_of_two_languages()}).splitlines() == [
        "| benchmark | language | direction     |   R@1 |  R@10 |    MR | median rank |   MRR |",
        "| --------- | -------- | ------------- | ----: | ----: | ----: | ----------: | ----: |",
        "| val       | zh       | text to image | 0.250 | 1.000 | 0.625 |        12.5 | 0.250 |",
        "| val       | zh       | image to text | 0.150 | 0.900 | 0.525 |        12.5 | 0.250 |",
        "| val       | en       | text to image | 0.100 | 0.500 | 0.300 |        12.5 | 0.250 |",
        "| val       | en       | image to text | 0.000 | 0.400 | 0.200 |        12.5 | 0.250 |",
    ]


def test_a_score_with_an_interval_says_half_its_width():
    intervals = {"zh/text_to_image/recall@1": (0.2, 0.31)}
    _, rows = score_rows({"val": scores_of_two_languages()}, {"val": intervals})
    assert rows[0][3:5] == ["0.250 ±0.055", "1.000"]
    assert in_interval(0.5, None) == "0.500"
