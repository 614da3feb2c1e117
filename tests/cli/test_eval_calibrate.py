"""`vlm eval calibrate` stores in a bundle what its embedder then offers, end to end."""

import json

import numpy as np
import pytest

from tests.builders import THINGS, encoded, make_image, make_samples, tiny_bundle, write_split
from vlm.cli.main import main
from vlm.embedding.embedder import Embedder


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle(tmp_path / "bundle", context_length=32)


@pytest.fixture
def data(tmp_path):
    return write_split(tmp_path / "data", make_samples(24), split="val")


def test_a_bundle_learns_what_its_cosines_mean(capsys, bundle, data):
    words = ["eval", "calibrate", str(bundle), "--data", str(data), "--precision", "0.4"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    stored = json.loads((bundle / "vlm.json").read_text(encoding="utf-8"))["calibration"]
    assert record["calibration"] == stored
    assert (stored["precision"], stored["prior"], stored["dim"]) == (0.4, 0.5, 32)
    assert stored["fitted_on"]["split"] == "val"
    assert set(record["checked"]) == {"zh", "en", "all"}
    embedder = Embedder.load(bundle, device="cpu")
    texts = embedder.encode_text([zh for _, zh in THINGS])
    images = embedder.encode_image([encoded(make_image(number)) for number in range(12)])
    expected = np.interp(texts @ images.T, stored["cosines"], stored["probabilities"])
    np.testing.assert_allclose(embedder.match_probability(texts, images), expected, atol=1e-6)
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"threshold {stored['threshold']:.4f} gives precision 0.4" in out
    assert [line.split("|")[1].strip() for line in out.splitlines()[-3:]] == ["zh", "en", "all"]


def test_a_precision_out_of_reach_leaves_the_bundle_alone(capsys, bundle, data):
    before = (bundle / "vlm.json").read_bytes()
    words = ["eval", "calibrate", str(bundle), "--data", str(data), "--prior", "0.001"]
    assert main([*words, "--precision", "0.9999"]) == 2
    assert "no cosine reaches the precision 0.9999" in capsys.readouterr().err.splitlines()[-1]
    assert (bundle / "vlm.json").read_bytes() == before


def test_the_files_of_a_benchmark_calibrate_as_well(capsys, bundle, tmp_path):
    rows = ["image,caption_en,caption_zh"]
    for number, (en, zh) in enumerate(THINGS):
        (tmp_path / f"{number}.png").write_bytes(encoded(make_image(number)))
        rows.append(f"{number}.png,{en.title()},{zh}")
    path = tmp_path / "held_out.csv"
    path.write_text("\n".join(rows), encoding="utf-8")
    words = ["eval", "calibrate", str(bundle), "--data", str(path), "--precision", "0.4"]
    assert main([*words, "--lower_case", "--languages", "en", "--json"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert set(record["checked"]) == {"en", "all"}
    fitted_on = record["calibration"]["fitted_on"]
    assert (fitted_on["data"], fitted_on["kind"]) == (str(path), "table")
    assert (fitted_on["duplicates"], fitted_on["languages"]) == ("by id", ["en"])
    assert "lower case" in fitted_on["cleaning"]
    assert "held_out: 12 images listed; 24 captions listed" in err


def test_a_setting_that_would_be_ignored_leaves_the_bundle_alone(capsys, bundle, data):
    before = (bundle / "vlm.json").read_bytes()
    words = ["eval", "calibrate", str(bundle), "--data", str(data), "--precision", "0.4"]
    assert main([*words, "--lower_case"]) == 2
    said = capsys.readouterr().err
    assert f"{data} is a data folder; found lower_case, which is for the files of a" in said
    assert (bundle / "vlm.json").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed", "-1"], "seed is -1; expected at least 0"),
        (["--prior", "1"], "the prior is 1.0; expected a number between 0 and 1"),
        (
            ["--data", "a", "b"],
            "found the argument 'b'; expected `vlm eval calibrate BUNDLE [options]`",
        ),
    ],
    ids=" ".join,
)
def test_a_mistake_is_told_before_the_bundle_is_read(capsys, more, said):
    assert main(["eval", "calibrate", "nowhere", *more]) == 2
    assert capsys.readouterr().err == f"vlm: {said}\n"


def test_several_processes_are_refused(capsys, bundle, data, monkeypatch):
    before = (bundle / "vlm.json").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", "calibrate", str(bundle), "--data", str(data), "--precision", "0.4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vlm: `vlm eval calibrate` was launched as 2 processes, each of which")
    assert (bundle / "vlm.json").read_bytes() == before
