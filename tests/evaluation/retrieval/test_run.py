"""A run scores every source it is given; its record has what was asked for, as it was given."""

import json

import pytest

import vlm
from tests.builders import make_samples, of_split, write_split
from vlm.errors import SearchIndexError
from vlm.evaluation.config import IndexPlan, RetrievalSource
from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
from vlm.evaluation.retrieval.pairs import pairs_of_split
from vlm.evaluation.retrieval.run import evaluate
from vlm.evaluation.retrieval.sources import sources_of


@pytest.fixture
def record_of(embedder, tmp_path, monkeypatch):
    write_split(tmp_path / "data", make_samples(12), split="test")
    monkeypatch.chdir(tmp_path)

    def record(source):
        run = evaluate(embedder, sources_of([source], folder_split="test"), bundle="b")
        return json.loads(json.dumps(run.as_record()))

    return record


def test_a_run_names_the_version_and_what_was_asked_for(record_of):
    source = RetrievalSource(path="data", name="mine", languages=("en",), where=["source!=photo"])
    record = record_of(source)
    assert (record["bundle"], record["vlm"]) == ("b", vlm.__version__)
    assert record["benchmarks"]["mine"]["source"] == {
        "path": "data", "name": "mine", "kind": None, "split": "test", "images": None,
        "language": None, "languages": ["en"], "where": ["source!=photo"],
        "duplicates": None, "lower_case": None, "allowed_share": None,
        "pixels": None, "questions": None, "part": None,
        "captions": None, "language_of": None, "image": None, "concept": None,
    }  # fmt: skip


def test_what_was_not_given_is_none_in_the_record(record_of):
    (scored,) = record_of("x=data")["benchmarks"].values()
    given = {name: value for name, value in scored["source"].items() if value is not None}
    assert given == {"path": "data", "name": "x", "split": "test"}


def test_paths_names_and_sources_are_scored_alike(embedder, tmp_path):
    folder = write_split(tmp_path / "data", make_samples(12), split="test_style")
    run = evaluate(embedder, [folder, f"again={folder}"], cutoffs=[1, 3])
    expected = evaluate_retrieval(
        embedder,
        pairs_of_split(of_split(folder, "test_style"), languages=["zh", "en"]),
        cutoffs=[1, 3],
    )
    assert run.benchmarks.keys() == {"test_style", "again"}
    for scored in run.benchmarks.values():
        assert scored.evaluation.scores == expected
        assert scored.pairs.kind == "data folder"


def test_indexes_are_compared_for_the_benchmarks_named_up_to_the_first_that_fails(
    embedder, tmp_path
):
    folder = write_split(tmp_path / "data", make_samples(12), split="test_style")
    run = evaluate(embedder, [f"first={folder}", f"second={folder}"])
    flat = run.with_indexes(IndexPlan(factories=["Flat"]), names=["second"])
    assert [scored.indexes is not None for scored in flat.benchmarks.values()] == [False, True]
    failed = run.with_indexes(IndexPlan(factories=["IVF5000,Flat"]))
    assert isinstance(failed.index_error, SearchIndexError)
    assert failed.benchmarks["first"].evaluation.scores == run.benchmarks["first"].evaluation.scores
