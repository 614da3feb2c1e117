"""Files that do not belong together are refused in one line: what was found, what was expected."""

import base64
import json
import re
import shutil

import pytest

from tests.builders import (
    THINGS,
    encoded,
    make_image,
    make_samples,
    tiny_bundle,
    tiny_tokenizer,
    write_split,
)  # fmt: skip
from tests.support.commands import run_vlm
from vlm.bundle import load_bundle
from vlm.cli.main import main
from vlm.text.tokenizer import load_tokenizer

CPU = ("--device", "cpu")


pytestmark = pytest.mark.slow


def refusal_of(*words):
    """Run a command that must fail; return its error, which is one line, without `vlm: `."""
    out, err = run_vlm(*words, *CPU, code=2)
    assert out == ""
    assert "Traceback" not in err
    (line,) = re.findall(r"\bvlm: (.+)", err)  # what comes before are findings and progress
    return line


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A bundle, another model's, and embeddings and an index of the first."""
    folder = tmp_path_factory.mktemp("wrong inputs")
    tiny_bundle(folder / "bundle", context_length=32)
    tiny_bundle(folder / "other", context_length=32, seed=1)
    write_split(folder / "data", make_samples(12), split="test")
    words = ["embed", str(folder / "bundle"), "--data", str(folder / "data"), "--split", "test"]
    assert main([*words, *CPU, "--out", str(folder / "embeddings")]) == 0
    assert main(["index", str(folder / "embeddings"), "--out", str(folder / "index")]) == 0
    return folder


def write_chinese_clip(folder, split, numbers):
    """Write images in Chinese-CLIP's layout, each with one caption."""
    folder.mkdir(exist_ok=True)
    images, texts = [], []
    for number in numbers:
        images.append(f"{number}\t{base64.b64encode(encoded(make_image(number))).decode()}\n")
        line = {"text_id": number, "text": THINGS[number % 12][1], "image_ids": [number]}
        texts.append(json.dumps(line, ensure_ascii=False) + "\n")
    (folder / f"{split}_imgs.tsv").write_text("".join(images))
    (folder / f"{split}_texts.jsonl").write_text("".join(texts), encoding="utf-8")


def write_table(folder, count=4):
    """Write a table of images that lie beside it."""
    folder.mkdir()
    rows = ["image,caption"]
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(make_image(number)))
        rows.append(f"{number}.png,{THINGS[number][0]}")
    (folder / "mine.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "mine.csv"


def test_captions_of_another_split_are_refused_with_the_first_case(workspace, tmp_path):
    folder = tmp_path / "muge"
    write_chinese_clip(folder, "test", range(20, 26))
    write_chinese_clip(folder, "valid", range(6))
    shutil.copy(folder / "test_texts.jsonl", folder / "valid_texts.jsonl")
    said = refusal_of(
        "eval", "retrieval", workspace / "bundle", "--data", folder, "--split", "valid"
    )
    assert said == (
        f"{folder} (valid): 6 of 6 captions name an image that is not listed (first: line 1, '20')"
        "; exceeds allowed_share 1.0%"
    )


def test_captions_of_another_file_are_refused_by_calibration_too(workspace, tmp_path):
    path = write_table(tmp_path / "mine")
    with path.open("a") as file:
        file.write("\nelsewhere/99.png,an image of another split")
    before = (workspace / "bundle/vlm.json").read_bytes()
    said = refusal_of("eval", "calibrate", workspace / "bundle", "--data", path)
    assert said == (
        f"{path}: 1 of 5 images are not on the disk (first: 'elsewhere/99.png' in {path.parent})"
        "; exceeds allowed_share 1.0%"
    )
    assert (workspace / "bundle/vlm.json").read_bytes() == before


def test_a_wrong_folder_of_images_is_refused_with_counts(workspace, tmp_path):
    path = write_table(tmp_path / "mine")
    wrong = tmp_path / "other images"
    wrong.mkdir()
    (wrong / "cat.png").write_bytes(encoded(make_image(0)))
    words = ["eval", "retrieval", workspace / "bundle", "--data", path, "--images"]
    assert refusal_of(*words, wrong) == (
        f"{path}: 4 of 4 images are not on the disk (first: '0.png' in {wrong})"
        "; exceeds allowed_share 1.0%"
    )


def test_a_bundle_with_another_tokenizer_is_refused(workspace, tmp_path):
    bundle = shutil.copytree(workspace / "bundle", tmp_path / "bundle")
    own = load_tokenizer(bundle / "tokenizer").fingerprint
    shutil.rmtree(bundle / "tokenizer")
    other = tiny_tokenizer(context_length=32, vocab_size=330)
    other.save(bundle / "tokenizer")
    said = refusal_of("eval", "retrieval", bundle, "--data", workspace / "data", "--split", "test")
    assert said == (
        f"{bundle} holds another tokenizer ({other.fingerprint[:12]}) than its model was trained "
        f"with ({own[:12]})"
    )


def test_an_index_is_not_searched_with_another_model(workspace):
    words = ["search", workspace / "index", "--text", "红苹果"]
    said = refusal_of(*words, "--bundle", workspace / "other")
    own, other = (load_bundle(workspace / name).fingerprint for name in ("bundle", "other"))
    assert said == (
        f"the index was made by another model ({own[:12]}) than the one given ({other[:12]})"
    )


def test_embeddings_of_a_bundle_that_was_trained_again_in_place_are_refused(workspace, tmp_path):
    bundle = shutil.copytree(workspace / "bundle", tmp_path / "bundle")
    folder = tmp_path / "embeddings"
    words = ["embed", str(bundle), "--data", str(workspace / "data"), "--split", "test"]
    assert main([*words, *CPU, "--out", str(folder)]) == 0
    shutil.rmtree(bundle)
    shutil.copytree(workspace / "other", bundle)
    own, other = (load_bundle(workspace / name).fingerprint for name in ("bundle", "other"))
    assert refusal_of("eval", "index", folder) == (
        f"the embeddings in {folder} were made by another model ({own[:12]}) than is in {bundle} "
        f"now ({other[:12]}); expected the same, so embed the images again"
    )


def test_an_image_that_is_cut_off_is_named(workspace, tmp_path):
    path = write_table(tmp_path / "mine")
    damaged = path.parent / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    said = refusal_of("eval", "retrieval", workspace / "bundle", "--data", path)
    assert said.startswith(f"{damaged} is damaged: ")
    out = tmp_path / "embeddings"
    words = ["embed", workspace / "bundle", "--images", path.parent, "--out", out]
    said = refusal_of(*words, "--allowed_share", "0")
    assert f"1 of 4 images cannot be read, more than allowed_share 0 permits (0): {damaged}" in said
    assert not (out / "embeddings.json").exists()
    _, err = run_vlm(*words, *CPU)
    assert f"left out: {damaged} is damaged: " in err


def test_a_condition_on_a_label_that_is_not_there_is_named_with_those_that_are(workspace):
    words = ["eval", "retrieval", workspace / "bundle", "--data", workspace / "data"]
    assert refusal_of(*words, "--split", "test", "--where", "grop!=even") == (
        f"no sample of the split 'test' of {workspace / 'data'} has 'grop', which 'grop!=even' "
        "asks for; expected one of source, concept, languages, group"
    )


def test_options_of_a_file_that_are_no_lists_are_refused(workspace, tmp_path):
    path = tmp_path / "asked.yaml"
    path.write_text(f"data: [{workspace / 'data'}]\nsplit: test\nlanguages: zh\n")
    said = refusal_of("eval", "retrieval", workspace / "bundle", "--config", path)
    assert said == "languages is zh; expected list of texts or null"
