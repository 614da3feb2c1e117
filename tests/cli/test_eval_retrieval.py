"""`vlm eval retrieval` on a data folder and on published benchmarks' files, as a person runs it."""

import base64
import json

import pytest

from tests.builders import THINGS, encoded, make_samples, picture, tiny_bundle, write_split
from vlm.cli.main import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def muge(tmp_path_factory):
    """Six pictures with two Chinese captions each, in Chinese-CLIP's layout."""
    folder = tmp_path_factory.mktemp("muge")
    rows, lines = [], []
    for number in range(6):
        content = base64.b64encode(encoded(picture(number))).decode()
        rows.append(f"{number}\t{content}\n")
        for text in (THINGS[number][1], f"{THINGS[number][1]}的图片"):
            line = {"text_id": len(lines), "text": text, "image_ids": [number]}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / "valid_imgs.tsv").write_text("".join(rows))
    (folder / "valid_texts.jsonl").write_text("".join(lines))
    return folder


def test_scores_of_several_benchmarks_come_with_what_was_asked(bundle, muge, tmp_path, capsys):
    data = write_split(tmp_path / "data", make_samples(24), split="test_style")
    out = tmp_path / "run.json"
    command = ["eval", "retrieval", str(bundle), "--data", f"MUGE={muge}", f"things={data}"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| MUGE" in printed
    assert "| things" in printed
    record = json.loads(out.read_text())
    asked = record["benchmarks"]["MUGE"]
    assert asked["kind"] == "chinese-clip"
    assert asked["questions"]["zh"]["captions"] == 12
    assert asked["questions"]["zh"]["captions_per_image"] == [2, 2.0, 2]
    assert asked["scores"]["zh/text_to_image/recall@10"] == 1.0
    assert asked["reading"]["context_length"] == 16
    assert set(record["benchmarks"]["things"]["questions"]) == {"zh", "en"}


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
