"""Runs are read back as they were written, damage is refused, and differences are described."""

import json

import pytest

from tests.support.run_files import RECALLS, benchmark, question, write_run
from vlm.errors import ConfigError, DataError
from vlm.reports.results import difference, read_results


def test_a_run_has_a_result_for_each_benchmark_and_language(tmp_path):
    zh, en = question(), question(language="en")
    run = write_run(
        tmp_path / "a.json",
        first=benchmark(zh, en, truncated_share=0.25),
        second=benchmark(en),
    )
    results = read_results([run])
    assert [(result.benchmark, result.language) for result in results] == [
        ("first", "zh"), ("first", "en"), ("second", "en"),
    ]  # fmt: skip
    for result in results:
        assert result.run == "runs/a/bundle"
        assert result.recalls == pytest.approx([100 * recall for recall in RECALLS])
        assert (
            result.question["fingerprint"] == (zh if result.language == "zh" else en)["fingerprint"]
        )
    assert [result.truncated_share for result in results] == [0.25, 0.25, 0.0]


def test_runs_of_one_bundle_are_distinguished_by_their_files(tmp_path):
    runs = [
        write_run(tmp_path / f"{name}.json", things=benchmark(question())) for name in ("a", "b")
    ]
    assert [result.run for result in read_results(runs)] == [
        f"runs/a/bundle ({run})" for run in runs
    ]
    with pytest.raises(ConfigError, match=r"a\.json is given 2 times; expected each run once"):
        read_results([runs[0], tmp_path / "." / "a.json"])


def test_equal_numbers_of_other_captions_differ_as_well():
    first, second = question(), question(sha256="f" * 64, fingerprint="other")
    assert difference(second, first).startswith(
        "the same numbers of images and captions, but other"
    )
    assert difference(first, first) == ""
    several = question(captions_per_image=[1, 1.053, 3])
    assert difference(several, first) == "1 to 3 (mean 1.053) captions per image instead of 2"
    assert difference(first | {"new": 1}, first) == "new 1 instead of unknown"


def without(key):
    record = benchmark(question())
    del record[key]
    return {"bundle": "b", "benchmarks": {"things": record}}


def with_recall(recall):
    record = benchmark(question(), recalls=(recall, *RECALLS[1:]))
    return {"bundle": "b", "benchmarks": {"things": record}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot read the run .*a.json: "),
        (b"\xff\xfe", "cannot read the run .*a.json: "),
        ([], "is not what `vlm eval retrieval --out` writes: there is no bundle"),
        ({"bundle": "b", "benchmarks": {}}, "there is no bundle with its benchmarks"),
        ({"bundle": "b", "benchmarks": {"things": 3}}, "is not what `vlm eval retrieval --out`"),
        ({"bundle": 3, "benchmarks": {"things": {}}}, "there is no bundle with its benchmarks"),
        ({"zh/mean_recall": 0.5}, "there is no bundle with its benchmarks"),
        (without("questions"), "it lacks 'questions'"),
        (without("reading"), "it lacks 'reading'"),
        (without("scores"), "it lacks 'scores'"),
        (with_recall(72.5), r"a ratio is 72\.5; expected a number in \[0, 1\]"),
        (with_recall(float("nan")), "a ratio is nan"),
        (with_recall("0.5"), "is not what `vlm eval retrieval --out` writes"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path, content, said):
    path = tmp_path / "a.json"
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said):
        read_results([path])


def test_a_missing_run_is_named(tmp_path):
    path = tmp_path / "gone.json"
    with pytest.raises(DataError) as caught:
        read_results([path])
    assert str(caught.value) == f"cannot read the run {path}: No such file or directory"


@pytest.mark.parametrize(
    ("name", "verb"),
    [("classification.json", "vlm eval classification"), ("index.json", "vlm eval index")],
)
def test_a_folder_of_another_verb_is_recognised_by_its_record(tmp_path, name, verb):
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=rf"^{tmp_path} was written by `{verb} --out`; expected"):
        read_results([tmp_path])
    write_run(tmp_path / "retrieval.json", things=benchmark(question()))
    assert len(read_results([tmp_path])) == 1
