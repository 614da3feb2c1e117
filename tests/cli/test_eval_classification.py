"""`vlm eval classification` scores labelled samples and folders of classes, end to end."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.builders import THINGS, encoded, make_image, make_sample, tiny_bundle, write_split
from tests.support.commands import run_vlm
from vlm.cli.main import main
from vlm.embedding.embedder import Embedder

NAMES = {
    "groups": {"even": {"en": "even", "zh": "双数"}, "odd": {"en": "odd", "zh": "单数；奇数"}},
    "classes": {f"thing-{n}": {"en": en, "zh": zh} for n, (en, zh) in enumerate(THINGS)},
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("run") / "bundle", context_length=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    samples = [
        make_sample(n, labels={"group": ("even", "odd")[n % 2], "class": f"thing-{n % 12}"})
        for n in range(24)
    ] + [make_sample(24, labels={"group": "even"})]
    folder = write_split(tmp_path_factory.mktemp("data"), samples, split="test")
    (folder / "classes.json").write_text(json.dumps(NAMES, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        path = folder / f"n{number % 6}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(make_image(number)))
    return folder


def run(capsys, *words, code=0):
    found = main(["eval", "classification", *map(str, words)])
    out, err = capsys.readouterr()
    assert found == code, err
    return out if code == 0 else err


@pytest.mark.slow
def test_labels_are_scored_in_both_languages(capsys, bundle, data, tmp_path):
    out = run(
        capsys, bundle, "--data", data, "--split", "test", "--out", tmp_path / "out", "--json"
    )
    record = json.loads(out)
    assert out == (tmp_path / "out" / "classification.json").read_text(encoding="utf-8")
    embedder = Embedder.load(bundle, device="cpu")
    images = embedder.encode_image([encoded(make_image(number)) for number in range(24)])
    assert list(record["scores"]) == ["zh", "en"]
    for language, found in record["scores"].items():
        confusion = found["confusion"]
        assert sum(sum(given.values()) for given in confusion.values()) == 24
        right = sum(given.get(name, 0) for name, given in confusion.items())
        assert right / 24 == pytest.approx(found["top1"])
        assert all(n > 0 for given in confusion.values() for n in given.values())
        assert found["mean_class_recall"] == pytest.approx(
            np.mean(list(found["class_recall"].values()))
        )
        assert list(found["class_recall"]) == list(NAMES["classes"])
        with Image.open(tmp_path / "out" / f"confusion_{language}.png") as image:
            image.load()
    assert record["baselines"]["random"]["top1"] == pytest.approx(1 / 12)
    protocol = record["protocol"]
    assert (protocol["images"], protocol["left_out"], protocol["classes"]) == (24, 1, 12)
    assert protocol["bundle"] == embedder.fingerprint
    assert protocol["names"]["zh"][0] == ["红苹果"]
    names = run(
        capsys, bundle, "--data", data, "--split", "test", "--templates", "name", "--json",
        "--languages", "en",
    )  # fmt: skip
    texts = embedder.encode_text([en for en, _ in THINGS])
    expected = ((images @ texts.T).argmax(axis=1) == np.arange(24) % 12).mean()
    assert json.loads(names)["scores"]["en"]["top1"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_report_lies_beside_the_record(capsys, bundle, data, tmp_path):
    words = ["--data", data, "--split", "test", "--out", tmp_path / "out"]
    assert main(["eval", "classification", *map(str, [bundle, *words])]) == 0
    out, err = capsys.readouterr()
    assert f"report: {tmp_path / 'out' / 'report.html'}" in err.splitlines()
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    record = json.loads((tmp_path / "out" / "classification.json").read_text(encoding="utf-8"))
    low, high = record["intervals"]["of"]["en/top5"]
    top5 = record["scores"]["en"]["top5"]
    assert low <= top5 <= high
    assert f"{top5:.3f} ±{(high - low) / 2:.3f}" in text
    assert "±" not in out
    assert f"`{bundle}`" in text
    assert record["protocol"]["images_sha256"] in text
    assert "(confusion_zh.png)" in text


@pytest.mark.slow
def test_vectors_are_kept_beside_the_results_or_where_asked(capsys, bundle, data, tmp_path):
    words = [bundle, "--data", data, "--split", "test", "--json"]
    plain = run(capsys, *words)
    assert run(capsys, *words, "--out", tmp_path / "out") == plain
    kept = list((tmp_path / "out" / "cache").rglob("*.npy"))
    assert len(kept) == 3  # images, and texts in two languages
    before = [path.stat().st_mtime_ns for path in kept]
    main(["eval", "classification", *map(str, words), "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert out == plain
    assert "24 from the cache" in err
    assert [path.stat().st_mtime_ns for path in kept] == before
    run(capsys, *words, "--out", tmp_path / "other", "--cache", tmp_path / "cache")
    assert not (tmp_path / "other" / "cache").exists()
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_report_what_one_does(bundle, tmp_path):
    words = ["eval", "classification", bundle, "--label", "group", "--json", "--device", "cpu"]
    one, _ = run_vlm(*words, "--out", tmp_path / "one")
    two, err = run_vlm(*words, "--out", tmp_path / "two", processes=2)
    assert json.loads(two) == json.loads(one)
    names = ["classification.json", "report.md", "confusion_zh.png", "confusion_en.png"]
    for name in [*names, "report.html"]:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    parts = {
        path.relative_to(tmp_path / "one"): path.read_bytes()
        for path in (tmp_path / "one" / "cache").rglob("*.npy")
    }
    assert len(parts) == 4  # of 1,726 images, and of texts in two languages
    assert all((tmp_path / "two" / name).read_bytes() == part for name, part in parts.items())
    assert err.count("embedding images:   0%") == 1  # one rank shows progress
    assert "from the cache" not in err
    assert err.count(f"report: {tmp_path / 'two' / 'report.html'}") == 1  # so does one


def test_another_label_and_conditions_give_a_table(capsys, bundle, data):
    out = run(
        capsys, bundle, "--data", data, "--split", "test", "--label", "group",
        "--where", "source=drawing", "--templates", "drawings",
    )  # fmt: skip
    lines = out.splitlines()
    assert lines[0] == "13 images of 2 of 2 classes; 0 left out"
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "names", "top-1", "top-5", "mean per class",
    ]  # fmt: skip
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["zh", "en", "random", "majority"]
    assert lines[7].split() == ["|", "majority", "|", "0.538", "|", "-", "|", "0.500", "|"]


def test_folders_of_classes_are_scored(capsys, bundle, images, tmp_path):
    (tmp_path / "en.txt").write_text("".join(f"{en}\n" for en, _ in THINGS[:6]))
    (tmp_path / "zh.json").write_text(json.dumps([zh for _, zh in THINGS[:6]]))
    both = [f"zh={tmp_path / 'zh.json'}", f"en={tmp_path / 'en.txt'}"]
    out = json.loads(run(capsys, bundle, "--images", images, "--classes", *both, "--json"))
    assert (out["protocol"]["images"], out["protocol"]["classes"]) == (12, 6)
    one = run(
        capsys, bundle, "--images", images, "--classes", tmp_path / "en.txt",
        "--languages", "en", "--json",
    )  # fmt: skip
    assert json.loads(one)["scores"]["en"] == out["scores"]["en"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split", "test", "--label", "colour"], "expected one for the label 'colour'"),
        (["--split", "gone"], "gone"),
        (["--split", "test", "--languages", "fr"], "not in fr; their languages are en, zh"),
        (["--split", "test", "--templates", "photos"], "there are no templates 'photos'"),
        (["--split", "test", "--where", "source"], "'source' is not a condition"),
        (["--split", "test", "--where", "source=x"], "has no sample where source=x"),
        (["--split", "test", "--where", "colour!=red"], "has 'colour', which 'colour!=red' asks"),
    ],
)
def test_mistakes_are_said_in_one_line(capsys, bundle, data, words, said):
    err = run(capsys, bundle, "--data", data, *words, code=2)
    assert said in err.splitlines()[-1]


def test_folders_without_names_are_refused(capsys, bundle, images):
    err = run(capsys, bundle, "--images", images, code=2)
    assert "needs --classes: the names of its classes" in err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--where", "group=even"], "found --where, for"),
        (["--split", "test_style"], "found --split, for"),
        (["--data", "data/emoji", "--label", "group"], "found --data and --label, for"),
    ],
    ids=["where", "a default", "two"],
)
def test_folders_with_what_is_for_samples_are_refused(capsys, bundle, images, words, found):
    err = run(capsys, bundle, "--images", images, "--classes", "a.txt", *words, code=2)
    (said,) = err.splitlines()
    assert f"--images {images} is a folder of images by class; {found} data folders only" in said


def test_what_is_not_there_is_named_once(capsys, bundle, data, tmp_path):
    gone = tmp_path / "gone"
    err = run(capsys, bundle, "--data", gone, code=2)
    assert err == f"vlm: {gone} is missing; expected a data folder, tars, tables or images\n"
    names = tmp_path / "gone.json"
    err = run(capsys, bundle, "--data", data, "--classes", names, code=2)
    assert err == f"vlm: cannot read the class names {names}: No such file or directory\n"


def test_a_data_folder_without_class_names_is_refused(capsys, bundle, tmp_path):
    folder = write_split(tmp_path / "data", [make_sample(0, labels={"class": "a"})], split="test")
    err = run(capsys, bundle, "--data", folder, "--split", "test", code=2)
    assert f"{folder} has no classes.json; expected one, or class names by --classes" in err


def test_a_model_that_names_no_languages_needs_them_named(capsys, bundle, data, tmp_path):
    silent = tmp_path / "silent"
    shutil.copytree(bundle, silent)
    record = json.loads((silent / "vlm.json").read_text(encoding="utf-8"))
    (silent / "vlm.json").write_text(json.dumps(record | {"languages": []}), encoding="utf-8")
    err = run(capsys, silent, "--data", data, "--split", "test", code=2)
    assert f"{silent} does not name its languages; give them with --languages" in err
