"""Every kind of model trained and converted by the commands, in real processes."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel

from tests.end_to_end.test_training import losses
from tests.support.commands import ROOT, run_vlm
from vlm.bundle import load_bundle
from vlm.cli.main import main
from vlm.embedding.embedder import Embedder
from vlm.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from vlm.training.config import TrainConfig
from vlm.training.start import build_start

STEPS = 6
# Towers of M2-Encoder's kind with all that can be trained beside their main head.
MULTIWAY = {
    "model.multiway.image_size": 32,
    "model.multiway.patch_size": 8,
    "model.multiway.width": 64,
    "model.multiway.heads": 2,
    "model.multiway.ffn_width": 128,
    "model.multiway.layers": 1,
    "model.multiway.vl_layers": 1,
    "model.multiway.embed_dim": 48,
    "model.multiway.text_positions": 34,
    "objectives.masked.cmlm_weight": 0.5,
    "objectives.masked.cmim_weight": 2.0,
    "objectives.masked.decoder_layers": 1,
    "objectives.matryoshka": "[16]",
    "objectives.language_embeddings": "true",
}
PARTS = ("main", "main_16", "unimodal", "cmlm", "cmim")
TWO_TOWERS = {
    "model.embed_dim": 32,
    "model.vision_cfg.timm_model_name": "test_resnet",
    "model.vision_cfg.image_size": 32,
    "model.text_cfg.width": 64,
    "model.text_cfg.heads": 2,
    "model.text_cfg.layers": 2,
}
TWO_TOWERS_CONFIG = ModelConfig(
    embed_dim=32,
    vision_cfg=ImageTowerConfig(timm_model_name="test_resnet", image_size=32),
    text_cfg=TextTowerConfig(width=64, heads=2, layers=2),
)
# open_clip's own description of a small English CLIP.
ENGLISH = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49_408, "width": 64, "heads": 2, "layers": 1},
}


def train_arguments(run_folder, **changes):
    options = {
        "run_folder": run_folder,
        "cpu_threads": 1,
        "data.batch_size": 16,
        "data.workers": 0,
        # At a higher rate Adam makes steps of gradients that are rounding errors alone.
        "optimizer.learning_rate": 1e-4,
        "schedule.steps": STEPS,
        "schedule.warmup_steps": 1,
        "report_every": 1,
        "checkpoint.every_steps": 0,
    } | changes
    return ["train", *(str(part) for key, value in options.items() for part in (f"--{key}", value))]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_multiway_model_with_every_objective_trains_alike_on_one_and_two_processes(tmp_path):
    run_vlm(*train_arguments(tmp_path / "one", **MULTIWAY))
    run_vlm(*train_arguments(tmp_path / "two", **MULTIWAY), processes=2)
    one, two = (
        {name: losses(tmp_path / run, f"loss/{name}") for name in PARTS} for run in ("one", "two")
    )
    for name in PARTS:
        assert len(one[name]) == STEPS
        # The loss of words is a mean over those that a rank has masked, and ranks mask as many
        # words as their captions have: a mean of means, which weighs them a little otherwise.
        tolerance = 5e-3 if name == "cmlm" else 1e-3
        assert two[name] == pytest.approx(one[name], rel=tolerance), name
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    # Before its first step the model is the same, and all but that mean is equal.
    for name in set(PARTS) - {"cmlm"}:
        assert two[name][0] == pytest.approx(one[name][0], rel=1e-5), name

    bundle = load_bundle(tmp_path / "two" / "bundle")
    assert bundle.truncate_dims == (16,)
    vectors = Embedder.load(tmp_path / "two" / "bundle", truncate_dim=16).encode_text(["红苹果"])
    assert vectors.shape == (1, 16)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_locked_tower_and_adapters_train_on_two_processes(tmp_path):
    changes = TWO_TOWERS | {
        "adapt.image_unlocked_groups": 0,
        "adapt.lora_rank": 4,
        "adapt.lora_towers": "[text]",
        "optimizer.learning_rate": 1e-2,
    }
    run_vlm(*train_arguments(tmp_path / "run", **changes), processes=2)
    after = load_bundle(tmp_path / "run" / "bundle").model.state_dict()
    untrained = TrainConfig(tokenizer=ROOT / "tokenizers/emoji-zh-en", model=TWO_TOWERS_CONFIG)
    before = build_start(untrained).model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in after if not before[name].equal(after[name])}
    assert not any(name.startswith("visual.") for name in changed)
    assert "text.transformer.resblocks.0.mlp.c_fc.weight" in changed
    assert len(losses(tmp_path / "run")) == STEPS


@pytest.mark.slow
def test_a_model_of_the_zoo_trains_with_the_tokenizers_vocabulary(tmp_path):
    changes = {
        "model.open_clip": "ViT-S-32-alt",  # the smallest that reads few patches
        "schedule.steps": 2,
        "data.batch_size": 4,
    }
    out, _ = run_vlm(*train_arguments(tmp_path / "run", **changes))
    bundle = load_bundle(tmp_path / "run" / "bundle")
    assert out.strip() == str(tmp_path / "run" / "bundle")
    assert bundle.preprocess_cfg["size"] == 224
    assert bundle.model.token_embedding.num_embeddings == bundle.tokenizer.vocab_size
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.slow
def test_bfloat16_trains_every_objective_and_leaves_weights_in_float32(tmp_path):
    run_vlm(*train_arguments(tmp_path / "run", precision="bf16", **MULTIWAY))
    for name in PARTS:
        found = torch.tensor(losses(tmp_path / "run", f"loss/{name}"))
        assert found.isfinite().all()
        assert len(found) == STEPS
    weights = load_file(tmp_path / "run" / "bundle" / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.fixture
def english(tmp_path):
    """An English CLIP of random weights, as a folder of open_clip."""
    folder = tmp_path / "english"
    folder.mkdir()
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**ENGLISH).state_dict(), folder / "open_clip_pytorch_model.bin")
    record = {"model_cfg": ENGLISH, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    return folder


@pytest.mark.slow
def test_an_english_clip_is_taught_chinese_scored_and_given_back(
    english, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    bundle, grown, run = tmp_path / "bundle", tmp_path / "grown", tmp_path / "run"
    assert main(["convert", str(english), "--to", str(bundle)]) == 0
    run_vlm(
        "convert", bundle, "--extend", ROOT / "tokenizers/clip-zh", "--init", "mean",
        "--positions", "128", "--to", grown,
    )  # fmt: skip
    stages = json.dumps([{"steps": 2, "trained": "new_rows"}, {"trained": "all"}])
    changes = {"start_from": grown, "stages": stages, "schedule.steps": 4}
    run_vlm(*train_arguments(run, **changes))
    capsys.readouterr()
    assert main(["eval", "retrieval", str(run / "bundle"), "--split", "val", "--json"]) == 0
    scores = capsys.readouterr().out
    assert "zh" in scores
    assert "en" in scores
    for target in ("open_clip", "hf"):
        words = ["convert", run / "bundle", "--to", tmp_path / target, "--format", target]
        assert main([str(word) for word in words]) == 0

    trained = load_bundle(run / "bundle")
    before = load_bundle(grown).model.token_embedding.weight
    assert trained.first_new_id is None
    assert trained.tokenizer.context_length == 128
    assert not trained.model.token_embedding.weight[49_408:].equal(before[49_408:])
    tokens = trained.tokenizer.encode(["一只猫在睡觉", "a cat sleeps"])
    with torch.inference_mode():
        expected = trained.model.encode_text(tokens)
        theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
        ids = torch.zeros(2, 128, dtype=torch.int64)
        ids[:, : tokens.ids.shape[1]] = tokens.ids
        torch.testing.assert_close(theirs.encode_text(ids, normalize=True), expected)
        hf = CLIPModel.from_pretrained(tmp_path / "hf").eval()
        pooled = hf.text_model(input_ids=tokens.ids, attention_mask=tokens.mask.long())
        features = hf.text_projection(pooled.pooler_output)
        unit = torch.nn.functional.normalize(features, dim=-1)
        torch.testing.assert_close(unit, expected, rtol=0, atol=1e-5)
