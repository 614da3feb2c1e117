"""The quickstart's own path at tiny size, and the commands that it tells people to try."""

import json

import numpy as np
import pytest
from PIL import Image

import vlm
from tests.builders import open_split
from tests.support.commands import TINY_QUICKSTART, run_vlm, start_vlm
from vlm.cli.main import main


@pytest.mark.slow
def test_it_leaves_a_run_folder_that_a_person_wants_to_look_at(quickstart):
    folder, out, err = quickstart
    assert {path.name for path in folder.iterdir()} == {
        "bundle", "checkpoints", "config.yaml", "config_history.yaml", "cosines.png",
        "embeddings", "env.json", "index", "loss.png", "metrics.jsonl", "recall.png",
        "recall_curves.png", "report.html", "report.md", "retrieval.json", "tensorboard",
    }  # fmt: skip
    report = (folder / "report.md").read_text()
    for part in ("loss.png", "recall.png", "| test_style ", "| HNSW32 "):
        assert part in report
    for name in ("loss.png", "recall.png", "recall_curves.png", "cosines.png"):
        with Image.open(folder / name) as plot:
            assert plot.width > 500
    page = (folder / "report.html").read_text()
    titles = [
        "What it answers", "Scores", "Everyday questions", "What it cannot do", "Languages",
        "Training",
    ]  # fmt: skip
    places = [page.index(f">{title}</h2>") for title in titles]
    assert places == sorted(places)
    limits = page[places[3] : places[4]]
    assert limits.count('<p class="query" lang="zh">') == 3
    assert page.count('alt="image at rank 5') >= 6
    assert "R@1 by pixels" in report
    assert "| test_novel_style " in out
    assert "HNSW32" in out
    assert err.count("vlm search") == 1
    assert err.count("vlm eval retrieval") == 1


@pytest.mark.slow
def test_its_scores_are_those_of_the_evaluation_command(quickstart, small_emoji):
    folder, _, _ = quickstart
    benchmarks = json.loads((folder / "retrieval.json").read_text())["benchmarks"]
    everyday = benchmarks["test_style"]["everyday"]
    assert everyday["questions"] + everyday["left_out"] == 160
    assert everyday["scores"].keys() == {
        f"{language}/{kind}"
        for language in ("zh", "en") for kind in ("hit@1", "hit@5", "precision@5")
    }  # fmt: skip
    assert [name for name, each in benchmarks.items() if "pixels" in each["baselines"]] == [
        "test_style", "test_style_no_flags"
    ]  # fmt: skip
    assert list(benchmarks) == [
        "test_style", "test_style_no_flags", "test_novel", "test_novel_style"
    ]  # fmt: skip
    out, _ = run_vlm(
        "eval", "retrieval", folder / "bundle", "--data", small_emoji, "--split", "test_style",
        "--where", "group!=flags", "--json", "--out", folder / "again",
    )  # fmt: skip
    again = json.loads(out)
    assert json.loads((folder / "again" / "retrieval.json").read_text()) == again
    asked, expected = again["benchmarks"]["test_style"], benchmarks["test_style_no_flags"]
    assert asked["scores"] == pytest.approx(expected["scores"])
    assert asked["questions"] == expected["questions"]
    assert asked["questions"]["zh"]["images"] < len(open_split(small_emoji, "test_style"))
    found = {
        (each["direction"], each["language"]): each for each in expected["indexes"]["comparisons"]
    }
    for language in ("zh", "en"):
        exact = found["text_to_image", language]["exact_recall"]["1"]
        assert exact == pytest.approx(expected["scores"][f"{language}/text_to_image/recall@1"])


@pytest.mark.slow
def test_its_index_answers_texts_and_images_like_the_python_interface(
    quickstart, small_emoji, tmp_path
):
    folder, _, _ = quickstart
    sample = open_split(small_emoji, "test_style")[7]
    image = tmp_path / "query.webp"
    image.write_bytes(sample.image)
    out, _ = run_vlm("search", folder / "index", "--image", image, "--k", "3", "--json")
    hits = json.loads(out)
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert hits[0]["uid"] == sample.uid
    assert hits[0]["score"] == pytest.approx(1, abs=1e-4)
    assert hits[0]["captions"]["zh"] == sample.captions["zh"][0]

    # Not a fork: this command ends its process in its own way.
    process = start_vlm("search", folder / "index", "--text", "一只猫", "--k", "2", "--json")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    model = vlm.load(folder / "bundle")
    query = model.encode_text(["一只猫"])
    images = [sample.image for sample in open_split(small_emoji, "test_style")]
    cosines = model.similarity(query, model.encode_image(images))[0]
    assert [hit["score"] for hit in json.loads(out)] == pytest.approx(
        np.sort(cosines)[::-1][:2], abs=1e-5
    )


@pytest.mark.slow
def test_a_folder_of_images_can_be_embedded_indexed_and_searched(quickstart, small_emoji, tmp_path):
    folder, _, _ = quickstart
    samples = [open_split(small_emoji, "val")[index] for index in range(5)]
    for number, sample in enumerate(samples):
        path = tmp_path / "images" / f"图 {number}" / "image.webp"
        path.parent.mkdir(parents=True)
        path.write_bytes(sample.image)
    embeddings, index = tmp_path / "embeddings", tmp_path / "index"
    run_vlm("embed", folder / "bundle", "--images", tmp_path / "images", "--out", embeddings)
    run_vlm("index", embeddings, "--out", index)
    out, _ = run_vlm("search", index, "--image", path, "--k", "99")
    lines = out.splitlines()
    assert len(lines) == 5
    assert str(path) in lines[0]
    _, err = run_vlm("index", embeddings, "--out", index, code=2)
    assert "exists already" in err


def test_a_folder_with_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert main(["quickstart", "--out", str(tmp_path), *TINY_QUICKSTART]) == 2
    assert "holds something else than a run" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
