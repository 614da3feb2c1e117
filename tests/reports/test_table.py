"""Results are in one table only if they have one protocol, or are marked."""

import json

import numpy as np
import pytest

from tests.builders import make_samples, tiny_bundle, write_split
from tests.support.run_files import RECALLS, benchmark, question, write_run
from vlm.cli.main import main
from vlm.errors import ConfigError, DataError
from vlm.reports.results import SCORES, read_results
from vlm.reports.table import as_record, format_tables, published_rows, tables_of


def lines_of(text):
    """Return the rows of Markdown tables, each as its cells."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory):
    """Evaluate two real models on two splits, one run as a user would."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_split(folder / "data", make_samples(12), split="test")
    write_split(data, make_samples(24), split="more")
    runs = []
    for seed in (0, 1):
        bundle = tiny_bundle(folder / f"bundle_{seed}", seed=seed)
        runs.append(folder / f"{seed}")
        words = ["--data", f"things={data}", "--split", "test", "--out", str(runs[-1])]
        assert main(["eval", "retrieval", str(bundle), *words]) == 0
    words = ["--data", f"things={data}", "--split", "more", "--out", str(folder / "more")]
    assert main(["eval", "retrieval", str(folder / "bundle_1"), *words]) == 0
    return folder


def test_real_runs_of_two_models_share_a_table(real_runs, capsys):
    capsys.readouterr()
    assert (
        main(["eval", "table", str(real_runs / "0"), str(real_runs / "1" / "retrieval.json")]) == 0
    )
    text = capsys.readouterr().out
    assert text.count("### things, ") == 2
    runs = [json.loads((real_runs / f"{seed}" / "retrieval.json").read_text()) for seed in (0, 1)]
    for language in ("zh", "en"):
        asked = runs[0]["benchmarks"]["things"]["questions"][language]
        assert f"Protocol {asked['fingerprint']}: 12 images, 12 captions" in text
    rows = [row for row in lines_of(text) if "bundle_" in row[0]]
    assert len(rows) == 4
    for row in rows:
        run = runs["bundle_1" in row[0]]
        assert row[0] == run["bundle"]
    zh = runs[0]["benchmarks"]["things"]["scores"]
    expected = {float(f"{100 * zh[f'{language}/mean_recall']:.1f}") for language in ("zh", "en")}
    found = [float(row[-1]) for row in rows if "bundle_0" in row[0]]
    assert sorted(found) == pytest.approx(sorted(expected), abs=0.051)


def test_real_runs_on_other_images_are_refused(real_runs, capsys):
    words = ["eval", "table", str(real_runs / "0"), str(real_runs / "more")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "24 images instead of 12" in error
    assert main([*words, "--mixed"]) == 0
    assert "bundle_1 ≠ [1]" in capsys.readouterr().out


def test_a_row_has_six_recalls_and_their_mean(tmp_path):
    run = write_run(tmp_path / "a.json", things=benchmark(question()))
    (table,) = tables_of(read_results([run]))
    (row,) = lines_of(format_tables([table]))[2:]
    assert row == ["runs/a/bundle", "72.5", "92.4", "96.4", "87.9", "98.4", "99.4", "91.2"]
    assert table.rows[0].mean_recall == pytest.approx(100 * np.mean(RECALLS))


def test_halves_are_rounded_upwards(tmp_path):
    recalls = (0.787, 0.960, 0.987, 0.809, 0.965, 0.991)  # the mean in per cent is 91.65
    run = write_run(tmp_path / "a.json", things=benchmark(question(), recalls=recalls))
    assert lines_of(format_tables(tables_of(read_results([run]))))[-1][-1] == "91.7"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"texts": 4}, "4 captions instead of 8, 1 captions per image instead of 2"),
        ({"duplicates": "by string"}, "duplicates by string instead of by id"),
        ({"cleaning": "lower case"}, "cleaning lower case instead of none"),
    ],
)
def test_a_run_with_another_protocol_is_refused_with_what_differs(tmp_path, other, said):
    first = write_run(tmp_path / "a.json", things=benchmark(question()))
    second = write_run(tmp_path / "b.json", "runs/b/bundle", things=benchmark(question(**other)))
    results = read_results([first, second])
    with pytest.raises(DataError) as error:
        tables_of(results)
    assert str(error.value) == (
        "runs/b/bundle and runs/a/bundle have different protocols on things in zh: "
        f"{said}; expected the same protocol, or --mixed"
    )
    (table,) = tables_of(results, mixed=True)
    assert [row.comparable for row in table.rows] == [True, False]
    text = format_tables([table])
    assert "| runs/b/bundle ≠ [1] |" in text
    assert f"[1] ≠ protocol {question(**other)['fingerprint']}: {said}" in text
    assert "≠: not comparable with the other rows." in text


def test_another_benchmark_or_language_has_a_table_of_its_own(tmp_path):
    zh, en = question(), question(texts=4, language="en")
    runs = [
        write_run(tmp_path / "a.json", first=benchmark(zh, en), second=benchmark(zh)),
        write_run(tmp_path / "b.json", "runs/b", third=benchmark(en), first=benchmark(en)),
    ]
    tables = tables_of(read_results(runs))
    assert [(table.benchmark, table.language, len(table.rows)) for table in tables] == [
        ("first", "zh", 1), ("first", "en", 2), ("second", "zh", 1), ("third", "en", 1),
    ]  # fmt: skip


def test_truncated_captions_are_a_footnote(tmp_path):
    ratio = 12 / 25010
    cut = write_run(tmp_path / "a.json", things=benchmark(question(), truncated_share=ratio))
    whole = write_run(tmp_path / "b.json", "runs/b", things=benchmark(question()))
    text = format_tables(tables_of(read_results([cut, whole])))
    assert "[1] 0.048 % of the captions in all languages truncated to 52 tokens" in text
    assert lines_of(text)[-1][0] == "runs/b"


@pytest.mark.parametrize("name", ["flickr30k", "Flickr-30K", "own=flickr30k"])
def test_published_rows_join_the_benchmark_of_their_name(tmp_path, name):
    wanted, place = (name, "own") if "=" in name else ("flickr30k", name)
    asked = question(language="en", images=1000, captions=5000)
    run = write_run(tmp_path / "a.json", **{place: benchmark(asked, question())})
    tables = {t.language: t for t in tables_of(read_results([run]), published=[wanted])}
    assert len(tables["zh"].rows) == 1
    rows = tables["en"].rows[1:]
    expected = [row for row in published_rows() if row.benchmark == "flickr30k"]
    assert [row.name for row in rows] == [row.model for row in expected]
    for row, origin in zip(rows, expected, strict=True):
        assert row.published
        assert origin.source in row.remarks[0]
        assert row.comparable != row.name.startswith("M2-Encoder")
        assert (row.mean_recall is None) == (None in row.recalls)
    text = format_tables([tables["en"]])
    assert "| M2-Encoder-10B, published ≠ [2, 3] " in text
    assert "[3] ≠ protocol: 1,000 captions instead of 5,000" in text
    assert "| FLAVA-0.3B, published [1] " in text
    flava = next(row for row in lines_of(text) if row[0].startswith("FLAVA"))
    assert flava[1:] == ["65.2", "89.4", "-", "67.7", "94.0", "-", "-"]


def test_published_rows_of_what_no_run_has_are_a_table_of_their_own(tmp_path):
    run = write_run(tmp_path / "a.json", things=benchmark(question()))
    first, muge = tables_of(read_results([run]), published=["muge"])
    assert len(first.rows) == 1
    assert (muge.benchmark, muge.language, muge.question) == ("muge", "zh", None)
    assert all(row.mean_recall is None and row.comparable for row in muge.rows)
    assert "No run has this benchmark in this language." in format_tables([muge])


def test_json_has_the_scores_as_runs_have_them(tmp_path, capsys):
    asked = question(images=1000, captions=1053)
    run = write_run(tmp_path / "a.json", coco_cn=benchmark(asked))
    assert main(["eval", "table", str(run), "--published", "coco-cn, muge", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert [table["benchmark"] for table in tables] == ["coco_cn", "muge"]
    assert tables[0]["question"] == json.loads(json.dumps(asked))
    row, *others = tables[0]["rows"]
    assert [row["scores"][name] for name in SCORES] == pytest.approx(RECALLS)
    assert row["scores"]["mean_recall"] == pytest.approx(np.mean(RECALLS), abs=1e-6)
    assert all(other["published"] and other["comparable"] for other in others)
    assert as_record([]) == {"tables": []}


@pytest.mark.parametrize(
    ("published", "said"),
    [
        ("imagenet", "no published rows of 'imagenet'; expected one of flickr30k-cn, coco-cn, "),
        ("gone=muge", r"no run has a benchmark 'gone'; expected one of \['things'\]"),
    ],
)
def test_published_rows_that_are_not_there_are_refused(tmp_path, published, said):
    results = read_results([write_run(tmp_path / "a.json", things=benchmark(question()))])
    with pytest.raises(ConfigError, match=said):
        tables_of(results, published=[published])


def test_two_published_benchmarks_cannot_join_one(tmp_path):
    results = read_results([write_run(tmp_path / "a.json", things=benchmark(question()))])
    with pytest.raises(
        ConfigError, match="things is given the published rows of flickr30k and of coco"
    ):
        tables_of(results, published=["things=flickr30k", "things=coco"])


def test_nothing_is_no_table():
    with pytest.raises(
        ConfigError, match="nothing to tabulate; expected folders of runs, or --pub"
    ):
        tables_of([])
