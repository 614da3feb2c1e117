"""A benchmark opened with settings by name."""

from vlm.evaluation.config import RetrievalSource
from vlm.evaluation.retrieval.benchmarks.opening import open_benchmark


def opened(path, **settings):
    return open_benchmark(RetrievalSource(path=str(path), **settings))
