"""Evaluation verbs are told by flags or by a file what to ask, each benchmark in its own way."""

import base64
import json
from pathlib import Path

import pytest
import yaml

from tests.builders import THINGS, encoded, make_image
from vlm.cli import eval_calibrate, eval_retrieval
from vlm.cli.main import main
from vlm.cli.options import sources_in
from vlm.cli.parsing import parse
from vlm.errors import ConfigError, DataError
from vlm.evaluation.retrieval.evaluation import evaluate_retrieval
from vlm.evaluation.retrieval.sources import open_source

FIVE = Path(__file__).parents[2] / "configs/evaluate/five_benchmarks.yaml"


def sources(*words):
    words = ["bundle", *map(str, words)]
    options = parse(eval_retrieval.Options, words, prog="vlm eval retrieval", description="")
    return sources_in(options, options.data)


def written(folder, **content):
    path = folder / "asked.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


def complaint(capsys, file):
    """Return the one line that the verb prints, before it looks for the bundle."""
    assert main(["eval", "retrieval", "nowhere", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def write_chinese_clip(folder, split):
    """Write four images, each with two captions, one in Latin letters."""
    folder.mkdir(parents=True)
    images, texts = [], []
    for number in range(4):
        images.append(f"{number}\t{base64.b64encode(encoded(make_image(number))).decode()}\n")
        for text in (THINGS[number][1], f"{THINGS[number][1]} A{number}"):
            line = {"text_id": len(texts), "text": text, "image_ids": [number]}
            texts.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / f"{split}_imgs.tsv").write_text("".join(images))
    (folder / f"{split}_texts.jsonl").write_text("".join(texts), encoding="utf-8")


def write_karpathy(path, images, **more):
    """Write six images with two captions each; the first four are the test split."""
    images.mkdir(parents=True)
    listed = []
    for number in range(6):
        (images / f"{number}.jpg").write_bytes(encoded(make_image(number), "JPEG"))
        captions = [THINGS[number][0].title(), f"A {THINGS[number][0]}"]
        sentences = [{"raw": text, "tokens": text.split()} for text in captions]
        split = "test" if number < 4 else "restval"
        listed.append({"filename": f"{number}.jpg", "split": split, "sentences": sentences} | more)
    path.write_text(json.dumps({"images": listed, "dataset": "tiny"}))


@pytest.fixture
def five(tmp_path, monkeypatch):
    """Lay tiny files of the five benchmarks where the shipped configuration looks for them."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data/benchmarks"
    for name, split in (("MUGE", "valid"), ("COCO-CN", "test"), ("Flickr30k-CN", "test")):
        write_chinese_clip(root / name, split)
    write_karpathy(tmp_path / "flickr.json", root / "Flickr30k/flickr30k-images")
    (tmp_path / "flickr.json").rename(root / "Flickr30k/dataset_flickr30k.json")
    write_karpathy(tmp_path / "coco.json", root / "COCO/val2014", filepath="val2014")
    (tmp_path / "coco.json").rename(root / "COCO/dataset_coco.json")
    return root


def test_one_file_asks_all_five_published_benchmarks(five, embedder):
    asked = sources("--config", FIVE)
    opened = [open_source(source, languages=embedder.languages) for source in asked]
    found = zip(asked, opened, strict=True)
    assert [(source.name, pairs.kind, pairs.split) for source, pairs in found] == [
        ("MUGE", "chinese-clip", "valid"),
        ("COCO-CN", "chinese-clip", "test"),
        ("Flickr30k-CN", "chinese-clip", "test"),
        ("Flickr30k", "karpathy", "test"),
        ("COCO", "karpathy", "test"),
    ]
    for pairs in opened:
        ((language, texts),) = pairs.texts.items()
        assert language == ("zh" if pairs.kind == "chinese-clip" else "en")
        assert (len(pairs.images), len(texts.texts)) == (4, 8)
        assert pairs.duplicates == "by id"
        assert not any(text != text.lower() for text in texts.texts)
        scores = evaluate_retrieval(embedder, pairs)
        assert scores[f"{language}/text_to_image/recall@10"] == 1


@pytest.mark.slow
def test_one_command_scores_all_five(five, bundle, tmp_path, capsys):
    words = [
        "eval",
        "retrieval",
        str(bundle),
        "--config",
        str(FIVE),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    assert main(["eval", "table", str(tmp_path / "run"), "--published", "muge,coco-cn"]) == 0
    said = capsys.readouterr().out
    for name in ("MUGE", "COCO-CN", "Flickr30k-CN", "Flickr30k", "COCO"):
        assert f"### {name}, " in said
    assert "published" in said


def test_the_file_allows_no_missing_image(five, embedder):
    (five / "COCO/val2014/2.jpg").unlink()
    coco = sources("--config", FIVE)[-1]
    with pytest.raises(DataError, match=r"1 of 4 images are not on the disk .*val2014/2.jpg"):
        open_source(coco, languages=embedder.languages)


def test_a_benchmark_takes_the_verbs_settings_where_it_has_none(tmp_path):
    entries = [
        "MUGE=a/muge",
        {"path": "b.csv", "lower_case": False, "split": "dev", "languages": ["zh"]},
    ]
    path = written(tmp_path, data=entries, lower_case=True, allowed_share=0.5)
    first, second = sources("--config", path, "--split", "test")
    assert (first.name, first.path) == ("MUGE", "a/muge")
    assert (first.split, first.lower_case, first.allowed_share) == ("test", True, 0.5)
    assert (second.name, second.path) == ("b", "b.csv")
    assert (second.split, second.lower_case, second.allowed_share) == ("dev", False, 0.5)
    assert (first.languages, second.languages) == (None, ["zh"])


def test_benchmarks_on_the_command_line_replace_those_of_the_file(tmp_path):
    path = written(tmp_path, data=["a=b"], duplicates="by string")
    found = sources("--config", path, "--data", "c=d", "e/f.json")
    assert [source.name for source in found] == ["c", "f"]
    assert {source.duplicates for source in found} == {"by string"}


def test_the_options_survive_being_printed_and_read_again(tmp_path, capsys):
    path = written(tmp_path, data=["a=b", {"path": "c", "where": ["source=noto"]}])
    with pytest.raises(SystemExit):
        sources("--config", path, "--print_config")
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert sources("--config", again) == sources("--config", path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"data": [{"path": "a", "lowercase": True}]}, "did you mean 'data.lower_case'?"),
        ({"data": [{"path": "a", "pth": "a"}]}, "no option 'data.pth'; did you mean 'data.path'?"),
        ({"data": [{"name": "a"}]}, "data lacks path"),
        ({"data": [{"path": "a", "allowed_share": 2.0}]},
         "allowed_share is 2.0; expected a ratio in [0, 1]"),
        ({"data": [{"path": "a", "duplicates": "by luck"}]},
         "data.duplicates is by luck; expected by id or by string or null"),
        ({"data": [3]}, "data is 3; expected list of (text or settings)"),
        ({"data": "MUGE=a"}, "data is MUGE=a; expected list of (text or settings)"),
        ({"data": {"path": "a"}}, "data is {'path': 'a'}; expected list of (text or settings)"),
        ({"data": ["a=b", {"path": "c", "name": "a"}]}, "two benchmarks are called a: b and c"),
        ({"data": []}, "no benchmark is given; expected at least one NAME=PATH or PATH"),
        ({"languages": "zh"}, "languages is zh; expected list of texts or null"),
        ({"languages": [False]}, "expected list of texts or null"),
        ({"where": "source=noto"}, "where is source=noto; expected list of texts or null"),
        ({"where": 3}, "where is 3; expected list of texts or null"),
        ({"index": "HNSW32"}, "index is HNSW32; expected list of texts"),
        ({"lower_case": "sometimes"}, "lower_case is sometimes; expected true or false or null"),
        ({"data": [{"path": "a", "languages": "zh"}]},
         "data.languages is zh; expected list of texts or null"),
        ({"data": [{"path": "a", "where": [1]}]}, "expected list of texts or null"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_in_the_file_is_named_with_what_was_expected(tmp_path, capsys, content, said):
    assert said in complaint(capsys, written(tmp_path, **content))


def test_languages_may_be_left_open_in_a_file(tmp_path):
    path = written(tmp_path, data=["a=b", {"path": "c", "languages": None}], languages=None)
    assert [source.languages for source in sources("--config", path)] == [None, None]


def test_a_verb_with_one_source_takes_one():
    words = ["bundle", "--data", "x=some/where.csv"]
    options = parse(eval_calibrate.Options, words, prog="vlm eval calibrate", description="")
    (source,) = sources_in(options, [options.data], folder_split="val")
    assert (source.name, source.path, source.split) == ("x", "some/where.csv", None)


def test_a_text_that_names_nothing_is_refused():
    with pytest.raises(ConfigError, match="'MUGE=' names no benchmark"):
        sources("--data", "MUGE=")
