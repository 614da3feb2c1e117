"""Files as `vlm eval retrieval --out` writes them, with questions and scores on demand."""

import json
from dataclasses import asdict

import numpy as np

from vlm.evaluation.retrieval.pairs import RetrievalPairs, Texts, questions_of
from vlm.reports.results import SCORES

RECALLS = (0.72514, 0.924, 0.964, 0.879, 0.984, 0.994)
IMAGES = [f"image {number}".encode() for number in range(4)]


def question(*, texts=8, language="zh", **changes):
    """Return what a real question says of itself, with numbers of a real benchmark on demand."""
    matches = np.array([(number, number % len(IMAGES)) for number in range(texts)])
    pairs = RetrievalPairs(
        images=IMAGES,
        texts={language: Texts(texts=[f"text {n}" for n in range(texts)], matches=matches)},
        duplicates=changes.pop("duplicates", "by id"),
        cleaning=changes.pop("cleaning", "none"),
    )
    asked = questions_of(pairs)[language]
    return {"fingerprint": asked.fingerprint, **asdict(asked), **changes}


def benchmark(*questions, recalls=RECALLS, truncated_share=0.0):
    scores = {
        f"{asked['language']}/{name}": recall
        for asked in questions
        for name, recall in zip(SCORES, recalls, strict=True)
    }
    return {
        "scores": scores,
        "questions": {asked["language"]: asked for asked in questions},
        "reading": {"model": "a1", "context_length": 52, "truncated_share": truncated_share},
    }


def write_run(path, bundle="runs/a/bundle", **benchmarks):
    path.write_text(json.dumps({"bundle": bundle, "benchmarks": benchmarks}), encoding="utf-8")
    return path
