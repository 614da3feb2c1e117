"""`vlm eval index` compares indexes of stored embeddings, end to end."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.builders import encoded, make_image, make_samples, of_split, tiny_bundle, write_split
from vlm.cli.main import main
from vlm.embedding.embedder import Embedder
from vlm.evaluation.config import IndexPlan
from vlm.evaluation.indexes import compare_indexes
from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
from vlm.evaluation.retrieval.pairs import pairs_of_split

SEARCHES = [
    "zh text to image", "zh image to text", "en text to image", "en image to text",
    "image to image",
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("model") / "bundle", context_length=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("data"), make_samples(36), split="test")


@pytest.fixture(scope="module")
def embeddings(bundle, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors") / "embeddings"
    words = ["embed", str(bundle), "--data", str(data), "--split", "test", "--device", "cpu"]
    assert main([*words, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def words(embeddings):
    return ["eval", "index", str(embeddings), "--device", "cpu"]


@pytest.mark.slow
def test_indexes_stand_beside_exact_search(capsys, words, tmp_path):
    words += ["--index", "HNSW8", "IVF2,Flat@nprobe=2", "auto", "--sweep"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"report: {tmp_path / 'out' / 'report.html'}" in err.splitlines()
    record = json.loads(out)
    assert record == json.loads((tmp_path / "out/index.json").read_text(encoding="utf-8"))
    found = [(each["factory"], each["search"]) for each in record["comparisons"]]
    factories = ["HNSW8", "IVF2,Flat@nprobe=2", "auto: Flat"]
    assert found == [(factory, search) for factory in factories for search in SEARCHES]
    for each in record["comparisons"][5:]:
        assert each["index_recall"] == each["exact_recall"]
        assert each["ann_recall"] == {"1": 1, "5": 1, "10": 1}
    assert record["comparisons"][5]["parameters"] == {"nprobe": 2}
    assert set(record["sweep"]) == set(SEARCHES)
    assert [p["value"] for p in record["sweep"]["image to image"]["HNSW8"]][:3] == [1, 2, 4]
    with Image.open(tmp_path / "out/index.png") as image:
        assert image.format == "PNG"
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert text.count("\n| HNSW8 ") == len(SEARCHES)
    assert record["model"][:12] in text


def test_a_report_without_a_sweep_has_no_plot(words, tmp_path):
    assert main([*words, "--index", "Flat", "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"index.json", "report.html", "report.md"}


def test_exact_recalls_are_those_of_the_retrieval_evaluation(capsys, words, bundle, data):
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    embedder = Embedder.load(bundle, device="cpu")
    assert record["model"] == embedder.fingerprint
    pairs = pairs_of_split(of_split(data, "test"), languages=["zh", "en"])
    scores = evaluate_retrieval(embedder, pairs)
    for each in record["comparisons"][:4]:
        for k, recall in each["exact_recall"].items():
            assert recall == scores[f"{each['language']}/{each['direction']}/recall@{k}"]


def test_stored_embeddings_give_what_a_benchmarks_vectors_give(capsys, words, bundle, data):
    embedder = Embedder.load(bundle, device="cpu")
    pairs = pairs_of_split(of_split(data, "test"), languages=["zh", "en"])
    texts = {
        language: (embedder.encode_text(of_language.texts), of_language.matches)
        for language, of_language in pairs.texts.items()
    }
    images = embedder.encode_image(pairs.images)
    expected = compare_indexes(images, texts, IndexPlan(), device="cpu").comparisons
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparisons"]
    for one, other in zip(found, expected, strict=True):
        assert one["search"] == other.search
        assert list(one["exact_recall"].values()) == list(other.exact_recall.values())


def test_images_without_captions_are_searched_among_themselves(capsys, bundle, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(make_image(number)))
    folder = tmp_path / "embeddings"
    assert main(["embed", str(bundle), "--images", str(tmp_path), "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["eval", "index", str(folder), "--json"]) == 0
    comparisons = json.loads(capsys.readouterr().out)["comparisons"]
    assert [(each["search"], each["vectors"]) for each in comparisons] == [("image to image", 3)]


def test_the_table_has_a_row_a_search(capsys, words):
    assert main([*words, "--index", "SQ8"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| SQ8")]
    assert [row.split("|")[2].strip() for row in rows] == SEARCHES


def test_losses_are_told_on_stderr(capsys, words):
    # One bit for a whole vector tells no image from the others.
    assert main([*words, "--index", "PQ1x1"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert any("PQ1x1 costs " in line and " points of R@1 in " in line for line in told)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--memory", "much"], "memory is 'much'; expected a number of bytes above 0"),
        (["--memory", "1KiB"], "fits into 1024 bytes; expected at least"),
        (["--target_recall", "1.5"], "target_recall is 1.5; expected more than 0"),
        (["--sweep"], "found sweep, which a table does not show; expected --out or --json"),
        (["--index", "HSNW32"], "FAISS cannot make the index 'HSNW32'"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(capsys, words, more, said):
    assert main([*words, *more]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_several_processes_are_refused(capsys, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    assert "`vlm eval index` was launched as 2 processes" in capsys.readouterr().err


def test_a_bundle_is_refused_with_the_verb_that_takes_it(capsys, bundle):
    assert main(["eval", "index", str(bundle)]) == 2
    said = capsys.readouterr().err
    assert f"{bundle} is a bundle; expected a folder that `vlm embed` wrote" in said
    assert f"`vlm eval retrieval {bundle} --index`" in said


def test_a_folder_without_embeddings_is_refused(capsys, tmp_path):
    assert main(["eval", "index", str(tmp_path)]) == 2
    assert f"{tmp_path} holds no embeddings" in capsys.readouterr().err


def test_vectors_of_weights_that_are_gone_are_refused(capsys, embeddings, tmp_path):
    folder = shutil.copytree(embeddings, tmp_path / "embeddings")
    path = folder / "embeddings.json"
    record = json.loads(path.read_text(encoding="utf-8")) | {"fingerprint": "0" * 64}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert main(["eval", "index", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "made by another model (000000000000) than is in" in said
    assert "expected the same, so embed the images again" in said


def test_one_image_without_a_caption_is_nothing_to_compare(capsys, bundle, tmp_path):
    (tmp_path / "0.png").write_bytes(encoded(make_image(0)))
    folder = tmp_path / "embeddings"
    assert main(["embed", str(bundle), "--images", str(tmp_path), "--out", str(folder)]) == 0
    assert np.load(folder / "img_emb/img_emb_0.npy").shape == (1, 32)
    assert main(["eval", "index", str(folder)]) == 2
    assert "holds 1 images and no captions to search with" in capsys.readouterr().err
