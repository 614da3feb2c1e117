"""`vlm eval retrieval` on a data folder and on published benchmarks' files, as a person runs it."""

import base64
import json

import pytest

from tests.builders import THINGS, encoded, make_image, make_samples, tiny_bundle, write_split
from tests.support.commands import run_vlm
from vlm.cli.main import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def muge(tmp_path_factory):
    """Six images with two Chinese captions each, in Chinese-CLIP's layout."""
    folder = tmp_path_factory.mktemp("muge")
    rows, lines = [], []
    for number in range(6):
        content = base64.b64encode(encoded(make_image(number))).decode()
        rows.append(f"{number}\t{content}\n")
        for text in (THINGS[number][1], f"{THINGS[number][1]}的图片"):
            line = {"text_id": len(lines), "text": text, "image_ids": [number]}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / "valid_imgs.tsv").write_text("".join(rows))
    (folder / "valid_texts.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_scores_of_several_benchmarks_come_with_what_was_asked(bundle, muge, tmp_path, capsys):
    data = write_split(tmp_path / "data", make_samples(24), split="test_style")
    out = tmp_path / "run"
    command = ["eval", "retrieval", str(bundle), "--data", f"MUGE={muge}", f"things={data}"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| MUGE" in printed
    assert "| things" in printed
    assert {"report.html", "report.md", "retrieval.json"} <= {path.name for path in out.iterdir()}
    record = json.loads((out / "retrieval.json").read_text())
    asked = record["benchmarks"]["MUGE"]
    assert asked["kind"] == "chinese-clip"
    assert asked["questions"]["zh"]["captions"] == 12
    assert asked["questions"]["zh"]["captions_per_image"] == [2, 2.0, 2]
    assert asked["scores"]["zh/text_to_image/recall@10"] == 1.0
    assert asked["reading"]["context_length"] == 16
    assert set(record["benchmarks"]["things"]["questions"]) == {"zh", "en"}
    assert record["benchmarks"]["things"]["agreement"]["en/zh"]["translations"] == 12
    assert "indexes" not in asked


@pytest.mark.slow
def test_embeddings_are_kept_and_found_again(bundle, muge, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["eval", "retrieval", str(bundle), "--data", str(muge), "--out", str(out), "--json"]
    assert main(command) == 0
    first = capsys.readouterr().out
    kept = {path: path.stat().st_mtime_ns for path in (out / "cache").rglob("*.npy")}
    assert len(kept) == 2  # images, and texts
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in (out / "cache").rglob("*.npy")} == kept


def test_indexes_stand_beside_exact_search(bundle, muge, capsys):
    command = ["eval", "retrieval", str(bundle), "--data", str(muge)]
    assert main([*command, "--index", "Flat", "HNSW8"]) == 0
    printed = capsys.readouterr().out
    assert "| HNSW8 " in printed
    assert main([*command, "--index", "Flat", "--json"]) == 0
    (scored,) = json.loads(capsys.readouterr().out)["benchmarks"].values()
    exact = {
        f"{each['language']}/{each['direction']}/recall@1": each["exact_recall"]["1"]
        for each in scored["indexes"]["comparisons"]
        if each["language"]
    }
    assert len(exact) == 2
    assert {name: scored["scores"][name] for name in exact} == pytest.approx(exact)


def test_scores_are_not_lost_for_an_index_that_cannot_be_built(bundle, muge, tmp_path, capsys):
    command = [
        "eval",
        "retrieval",
        str(bundle),
        "--data",
        str(muge),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, "--index", "IVF5000,Flat"]) == 2
    said = capsys.readouterr()
    assert "IVF5000,Flat cannot be built from" in said.err.splitlines()[-1]
    assert "text to image" in said.out
    assert (tmp_path / "run" / "report.html").is_file()


def test_an_index_that_faiss_does_not_know_is_told_before_anything_is_embedded(
    bundle, muge, capsys
):
    command = ["eval", "retrieval", str(bundle), "--data", str(muge), "--index", "HSNW32"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "FAISS cannot make the index 'HSNW32'" in error
    assert "embedding" not in error


def test_a_file_gives_each_benchmark_settings_of_its_own(bundle, muge, tmp_path, capsys):
    data = write_split(tmp_path / "data", make_samples(24), split="test")
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        f"data:\n- {{name: MUGE, path: {muge}, lower_case: true, duplicates: by string}}\n"
        f"- {{name: things, path: {data}, split: test, where: [source=photo]}}\n"
    )
    assert main(["eval", "retrieval", str(bundle), "--config", str(config), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["benchmarks"]
    assert scored["MUGE"]["questions"]["zh"]["duplicates"] == "by string"
    assert "lower case" in scored["MUGE"]["questions"]["zh"]["cleaning"]
    assert scored["things"]["questions"]["zh"]["images"] == 12


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_share_the_work_report_what_one_reports(bundle, muge, tmp_path):
    data = write_split(tmp_path / "data", make_samples(24), split="test_style")
    command = ["eval", "retrieval", bundle, "--data", f"MUGE={muge}", f"things={data}"]
    alone, _ = run_vlm(*command, "--json")
    shared, _ = run_vlm(
        *command, "--json", "--out", tmp_path / "run", "--device", "cpu", processes=2
    )
    alone, shared = (json.loads(text)["benchmarks"] for text in (alone, shared))
    for name, expected in alone.items():
        found = shared[name]
        assert found["scores"] == pytest.approx(expected["scores"])
        assert found["questions"] == expected["questions"]
        assert found["agreement"] == expected["agreement"]
        for language, cosines in expected["cosines"].items():
            for which, spread in cosines.items():
                assert found["cosines"][language][which] == pytest.approx(spread, abs=1e-6)
    assert (tmp_path / "run" / "report.html").is_file()


def test_json_is_printed_instead_of_a_table(bundle, muge, capsys):
    assert main(["eval", "retrieval", str(bundle), "--data", str(muge), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert list(record["benchmarks"]) == [muge.name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "{muge}", "--split", "test"], "test"),
        (["--data", "{muge}", "{muge}"], "two benchmarks are called"),
        (["--data", "{muge}", "--languages", "en"], "expected en as well"),
    ],
)
def test_a_mistake_is_one_line(bundle, muge, options, said, capsys):
    words = [word.format(muge=muge) for word in options]
    assert main(["eval", "retrieval", str(bundle), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vlm: ")
    assert said in error
