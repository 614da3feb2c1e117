"""`vlm eval index` compares indexes of a bundle's vectors or of stored ones, end to end."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from tests.builders import THINGS, make_samples, picture, tiny_bundle, write_split
from vlm.cli import eval_index
from vlm.cli.main import main

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


@pytest.fixture
def words(bundle, data):
    return [
        "eval", "index", str(bundle), "--data", str(data), "--split", "test", "--device", "cpu"
    ]  # fmt: skip


def test_indexes_stand_beside_exact_search(capsys, words, tmp_path):
    words += ["--factory", "HNSW8", "IVF2,Flat@nprobe=2", "auto", "--sweep"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
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


def test_exact_recalls_are_those_of_the_retrieval_evaluation(capsys, words):
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert main(["eval", "retrieval", *words[2:], "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["benchmarks"]["test"]
    scores = evaluated["scores"]
    assert record["questions"] == {
        language: question["fingerprint"] for language, question in evaluated["questions"].items()
    }
    for each in record["comparisons"][:4]:
        for k, recall in each["exact_recall"].items():
            assert recall == scores[f"{each['language']}/{each['direction']}/recall@{k}"]


def test_the_files_of_a_benchmark_are_searched_as_well(capsys, bundle, tmp_path):
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{en}" for number, (en, _) in enumerate(THINGS[:4])]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    words = ["eval", "index", str(bundle), "--data", str(path), "--device", "cpu", "--json"]
    assert main(words) == 0
    comparisons = json.loads(capsys.readouterr().out)["comparisons"]
    assert [each["vectors"] for each in comparisons] == [4, 4, 4]


def test_stored_embeddings_give_what_their_bundle_gives(capsys, words, bundle, data, tmp_path):
    folder = tmp_path / "embeddings"
    embed = ["embed", str(bundle), "--data", str(data), "--split", "test", "--out", str(folder)]
    assert main([*embed, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["comparisons"]
    words = ["eval", "index", str(folder), "--device", "cpu", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["comparisons"]
    for one, other in zip(found, expected, strict=True):
        assert (one["search"], one["exact_recall"]) == (other["search"], other["exact_recall"])
    assert main([*words, "--split", "test"]) == 2
    assert "holds embeddings, which have no split" in capsys.readouterr().err
    path = folder / "embeddings.json"
    record = json.loads(path.read_text(encoding="utf-8")) | {"fingerprint": "0" * 64}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert main(words) == 2
    assert "made by another model (000000000000) than is in" in capsys.readouterr().err


def test_the_table_has_a_row_a_search_and_losses_are_told_on_stderr(capsys, words, monkeypatch):
    def losing(*given, **options):
        for each in eval_index_compare_all(*given, **options):
            exact = {k: recall + 0.02 for k, recall in each.index_recall.items()}
            yield replace(each, exact_recall=exact, reached_target=False)

    eval_index_compare_all = eval_index.compare_all
    monkeypatch.setattr(eval_index, "compare_all", losing)
    assert main([*words, "--factory", "SQ4"]) == 0
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if line.startswith("| SQ4")]
    assert [row.split("|")[2].strip() for row in rows] == [
        search.removeprefix("zh ").removeprefix("en ") for search in SEARCHES
    ]
    told = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "warning: SQ4 costs 2.0 points" in told[0]
    assert "of R@1 in zh text to image: " in told[0]
    assert "no search parameter brings SQ4 to a recall of 0.95 in zh text to image" in told[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--memory", "much"], "memory is 'much'; expected a size such as 512MiB"),
        (["--memory", "1KiB"], "fits into 1024 bytes; expected at least"),
        (["--target_recall", "1.5"], "target_recall is 1.5; expected more than 0"),
        (["--factory", "HSNW32"], "FAISS cannot make the index 'HSNW32'"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(capsys, words, more, said):
    assert main([*words, *more]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 2**30), ("1.5kb", 1500), ("512 MiB", 2**29), ("77", 77), ("2gb", 2 * 10**9)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert eval_index._bytes_in(text) == size
