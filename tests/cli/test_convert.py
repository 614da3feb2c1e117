"""`vlm convert` reads and writes checkpoints, and says on stderr what it left out."""

import json

import open_clip
import pytest
import torch

from tests.support.commands import ROOT, run_vlm
from vlm.bundle import load_bundle

CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """A small English CLIP as a folder of open_clip."""
    folder = tmp_path_factory.mktemp("source") / "english"
    folder.mkdir()
    torch.manual_seed(0)
    state = open_clip.CLIP(**CFG).state_dict() | {"text_decoder.ln.bias": torch.zeros(2)}
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    record = {"model_cfg": CFG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    return folder


@pytest.mark.slow
def test_a_folder_becomes_a_bundle_with_what_was_said(english, tmp_path):
    out, err = run_vlm(
        "convert", english, "--to", tmp_path / "bundle", "--languages", "en", "de",
        "--preprocess.resize_mode", "squash", "--context_length", "32",
    )  # fmt: skip
    assert out == f"{tmp_path / 'bundle'}\n"
    assert "is an open_clip checkpoint" in err
    assert "left out 1 tensors on purpose: text_decoder.ln.bias" in err
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.languages == ("en", "de")
    assert bundle.preprocess_cfg["resize_mode"] == "squash"
    assert bundle.tokenizer.context_length == 32


@pytest.mark.slow
def test_one_command_extends_and_writes_another_format(english, tmp_path):
    out, err = run_vlm(
        "convert", english, "--to", tmp_path / "hf", "--format", "hf", "--extend",
        ROOT / "tokenizers/clip-zh", "--init", "mean", "--positions", "128",
    )  # fmt: skip
    assert out == f"{tmp_path / 'hf'}\n"
    assert "mends no broken encodings" in err
    text = json.loads((tmp_path / "hf/config.json").read_text())["text_config"]
    assert (text["vocab_size"], text["max_position_embeddings"]) == (57_408, 128)
    assert text["eos_token_id"] == 49_407


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--positions", "128"], "need a tokenizer; name it with --extend"),
        (["--format", "m2"], "M2-Encoder's format holds multiway towers"),
        (["--format", "onnx"], "onnx"),
        (["--image_sise", "3"], "did you mean 'image_size'"),
    ],
)
def test_a_mistake_is_one_line(english, tmp_path, options, said):
    out, err = run_vlm("convert", english, "--to", tmp_path / "out", *options, code=2)
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert not (tmp_path / "out").exists()
