"""Verbs read any source, at a URL as here, and say in one line what is wrong with one."""

import json
import shutil

import numpy as np
import pytest

from tests.builders import THINGS, encoded, make_image, make_samples, write_img2dataset, write_split
from tests.support.object_store import ObjectStore
from tests.support.web_server import WebServer
from vlm.cli.main import main
from vlm.embedding.parts import read_embeddings
from vlm.storage import places

NAMES = {"odd": {"en": "odd", "zh": "单数"}, "even": {"en": "even", "zh": "双数"}}
VERBS = {
    "embed": ["embed", "{bundle}", "--out", "{out}"],
    "retrieval": ["eval", "retrieval", "{bundle}"],
    "classification": ["eval", "classification", "{bundle}", "--label", "group"],
    "calibrate": ["eval", "calibrate", "{bundle}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with class names, tars, images with captions, images alone, and nothing."""
    folder = tmp_path_factory.mktemp("served") / "web"
    write_split(folder / "data", make_samples(24), split="test_style")
    write_split(folder / "data", make_samples(24), split="val")
    (folder / "data/classes.json").write_text(json.dumps(NAMES), encoding="utf-8")
    write_img2dataset(folder / "tars", [en for en, _ in THINGS], samples_per_shard=5)
    for name in ("images", "bare", "empty"):
        (folder / name).mkdir()
    for number, (en, zh) in enumerate(THINGS[:4]):
        for name in ("images", "bare"):
            (folder / f"{name}/{number}.png").write_bytes(encoded(make_image(number)))
        record = {
            "captions": {"en": en, "zh": zh},
            "labels": {"group": ("even", "odd")[number % 2]},
        }
        (folder / f"images/{number}.json").write_text(json.dumps(record), encoding="utf-8")
    rows = [f"{number}.png,{en}" for number, (en, _) in enumerate(THINGS[:4])]
    (folder / "mine.csv").write_text("\n".join(["image,title", *rows]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def web(folder):
    with WebServer(folder) as server:
        yield server


@pytest.fixture
def embed(bundle, tmp_path):
    """Embed a source; return the vectors and the metadata."""

    def embed(path, *words):
        out = tmp_path / f"out {len(list(tmp_path.iterdir()))}"
        words = ["embed", bundle, "--data", path, "--out", out, "--device", "cpu", *words]
        assert main([*map(str, words)]) == 0
        _, vectors, metadata = read_embeddings(out)
        return vectors, metadata

    return embed


@pytest.fixture
def record(bundle, capsys):
    """Evaluate a source; return what was printed as JSON."""

    def record(verb, *words):
        words = ["eval", verb, bundle, "--json", "--device", "cpu", *words]
        capsys.readouterr()  # of what was run before
        assert main([*map(str, words)]) == 0
        return json.loads(capsys.readouterr().out)

    return record


@pytest.mark.parametrize(
    ("here", "there", "count"),
    [
        ("data", "data", 24),
        ("tars", "tars/{00000..00002}.tar", 12),
        ("tars/*.tar", "tars/{00000..00002}.tar", 12),
    ],
)
def test_embeddings_of_a_url_are_those_of_the_files(embed, web, here, there, count):
    vectors, metadata = embed(web.folder / here)
    at_url, of_url = embed(web.url(there))
    assert len(vectors) == count
    np.testing.assert_array_equal(at_url, vectors)
    for column in ("uid", "caption_en", "caption_zh"):
        assert of_url[column].to_pylist() == metadata[column].to_pylist()
    assert of_url["image_path"][0].as_py() == f"{web.url(there).partition('{')[0].rstrip('/')}/" + (
        "test_style-00000.tar.gz#0" if here == "data" else "00000.tar#0"
    )


def test_embed_takes_conditions_fields_and_the_folder_of_a_tables_images(embed, folder, embedder):
    _, odd = embed(folder / "images", "--where", "group=odd")
    assert odd["caption_zh"].to_pylist() == [THINGS[1][1], THINGS[3][1]]
    words = ["--images", folder / "images", "--captions.zh", "title"]
    vectors, metadata = embed(folder / "mine.csv", *words)
    assert metadata["caption_zh"].to_pylist() == [en for en, _ in THINGS[:4]]
    expected = embedder.encode_image([make_image(number) for number in range(4)])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["data", "tars/{00000..00002}.tar"])
def test_scores_of_a_url_are_those_of_the_files(record, web, name):
    here = record("retrieval", "--data", f"mine={web.folder / name}")["benchmarks"]["mine"]
    there = record("retrieval", "--data", f"mine={web.url(name)}")["benchmarks"]["mine"]
    assert there.pop("source")["path"] == web.url(name)
    here.pop("source")
    assert there == here
    assert here["questions"]["en"]["captions"] == 12


def test_classes_of_a_url_are_those_of_the_folder(record, web):
    words = ["--label", "group", "--data"]
    here = record("classification", *words, web.folder / "data")
    there = record("classification", *words, web.url("data"))
    assert there["protocol"].pop("data") == web.url("data")
    here["protocol"].pop("data")
    assert there == here
    assert here["protocol"]["images"] == 24


def test_samples_of_any_source_are_classified_by_names_at_a_url(record, web):
    words = ["--label", "group", "--classes", web.url("data/classes.json?signature=a")]
    found = record("classification", *words, "--data", web.folder / "images")
    assert (found["protocol"]["images"], found["protocol"]["split"]) == (4, "train")
    confusion = found["scores"]["en"]["confusion"]
    assert {name: sum(given.values()) for name, given in confusion.items()} == {"odd": 2, "even": 2}


def test_a_calibration_by_a_url_is_that_by_the_folder(bundle, web, tmp_path, capsys):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    words = ["eval", "calibrate", str(copy), "--precision", "0.3", "--json", "--data"]
    found = []
    for path in (str(web.folder / "data"), web.url("data")):
        assert main([*words, path]) == 0
        found.append(json.loads(capsys.readouterr().out))
    here, there = found
    assert there["calibration"]["fitted_on"].pop("data") == web.url("data")
    here["calibration"]["fitted_on"].pop("data")
    assert there == here


@pytest.mark.slow
def test_a_bucket_gives_what_the_folder_gives(embed, record, folder):
    with ObjectStore() as store:
        store.put_folder(folder, "own")
        np.testing.assert_array_equal(embed("s3://pairs/own/tars/*.tar")[0],
                                      embed(folder / "tars")[0])  # fmt: skip
        for verb, words in (("retrieval", []), ("classification", ["--label", "group"])):
            here = record(verb, *words, "--data", folder / "data")
            there = record(verb, *words, "--data", "s3://pairs/own/data")
            written = json.dumps(there).replace("s3://pairs/own", str(folder))
            assert json.loads(written) == here


@pytest.fixture
def complaint(bundle, tmp_path, capsys):
    """Return the one line that a verb prints about a source; nothing is written."""

    def complaint(verb, *words):
        out = tmp_path / "out"
        options = [word.format(bundle=bundle, out=out) for word in VERBS[verb]]
        assert main([*options, "--device", "cpu", *map(str, words)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert not out.exists()
        (line,) = printed.err.splitlines()
        return line.removeprefix("vlm: ")

    return complaint


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gone", "gone "),
        ("s4://bucket/folder", "unknown scheme 's4'; expected a local path or one of s3"),
        ("pipe:cat 0.tar", "pipe:cat 0.tar: commands are not run; expected a path or an address"),
        ("zip://0.tar::s3://bucket/a.zip", "chained addresses are not read"),
        ("tars/{0..2.tar", "unbalanced braces; expected a range like"),
    ],
)
def test_what_is_no_source_is_one_line(complaint, verb, path, said):
    assert said in complaint(verb, "--data", path)


@pytest.mark.parametrize(
    ("verb", "path", "words", "said"),
    [
        ("embed", "bare", [], "holds images without captions, such as 0.png; expected 0.txt or"),
        ("embed", "empty", [], "holds no samples; expected a manifest.json, tars, tables"),
        ("embed", "data", ["--split", "nope"], "no split 'nope'; its splits are test_style, val"),
        ("embed", "images", ["--split", "nope"], "images has no splits; found the split 'nope'"),
        ("embed", "data", ["--images", "x"], "is no table (data folder); found images, which only"),
        ("embed", "data", ["--where", "colour=red"], "'colour', which 'colour=red' asks for"),
        ("embed", "mine.csv", ["--captions.en", "x"], "mine.csv has no column 'x'; its columns"),
        ("retrieval", "bare", [], "table), and as a source: "),
        ("retrieval", "empty", [], "and as a source: "),
        ("retrieval", "images", ["--where", "a=b"], "no sample of the split 'train' of "),
        ("retrieval", "data", ["--split", "nope"], "no split 'nope'; its splits are test_style"),
        ("retrieval", "data", ["--lower_case"], "is a data folder; found lower_case, which is for"),
        ("retrieval", "tars", ["--where", "a=b"], "is a benchmark (webdataset); found where, whi"),
        ("retrieval", "tars", ["--captions.en", "txt"], "(webdataset); found captions, which is"),
        ("retrieval", "images", ["--languages", "fr"], "has captions in en, zh; expected fr as"),
        ("classification", "tars", [], "tars has no classes.json; expected one, or class names by"),
        ("classification", "empty", [], "holds no samples; expected a manifest.json, tars"),
        ("classification", "data", ["--split", "nope"], "no split 'nope'; its splits are test_st"),
        ("calibrate", "data", ["--split", "nope"], "no split 'nope'; its splits are test_style"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_source_is_one_line(complaint, folder, verb, path, words, said):
    assert said in complaint(verb, "--data", folder / path, *words)


@pytest.mark.parametrize("verb", VERBS)
def test_a_url_without_a_source_is_one_line_without_its_signature(complaint, web, verb):
    said = complaint(verb, "--data", web.url("none?signature=secret"))
    expected = "/none/manifest.json is not there; expected a data folder, or tars by a pattern"
    assert expected in said
    assert "secret" not in said


def test_a_data_folder_at_a_url_without_class_names_is_one_line(complaint, web, tmp_path):
    (web.folder / "data/classes.json").rename(tmp_path / "classes.json")
    try:
        said = complaint("classification", "--data", web.url("data"))
    finally:
        (tmp_path / "classes.json").rename(web.folder / "data/classes.json")
    assert (
        said == f"{web.url('data')} has no classes.json; expected one, or class names by --classes"
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_stays_away_is_one_line(complaint, monkeypatch, verb):
    patiently = places._patiently
    monkeypatch.setattr(places, "_patiently", lambda call, url, _: patiently(call, url, 0.3))
    said = complaint(verb, "--data", "http://127.0.0.1:9/data")
    assert said.startswith("http://127.0.0.1:9/data/")
    assert "stayed away for 0.3 s, in " in said
