"""A bundle gives the same features after reading, in open_clip too; a damaged one is refused."""

import json
import shutil
import socket
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.builders import (
    IMAGE_SIZE,
    THINGS,
    TINY_MODEL,
    encoded,
    make_image,
    tiny_bundle,
    tiny_model,
    tiny_tokenizer,
)
from vlm.bundle import load_bundle, save_bundle, store_calibration
from vlm.calibration import Calibration
from vlm.embedding.embedder import Embedder
from vlm.errors import CheckpointError, TokenizerError, VlmError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.models.build import build_encoder, build_from_config, encoder_model_cfg
from vlm.models.config import ModelConfig
from vlm.models.multiway_config import MultiwayConfig

WEIGHTS = "open_clip_model.safetensors"
TEXTS = [text for pair in THINGS for text in pair]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "bundle")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pixels(bundle, count=6):
    return torch.stack([bundle.transform(make_image(number)) for number in range(count)])


def save(folder, model, tokenizer, **changes):
    save_bundle(
        folder,
        model=model,
        model_cfg=encoder_model_cfg(TINY_MODEL, tokenizer),
        preprocess_cfg=preprocess_cfg(PreprocessConfig(**changes), IMAGE_SIZE),
        tokenizer=tokenizer,
        languages=("zh", "en"),
    )


def change_json(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@torch.inference_mode()
def test_a_read_bundle_gives_equal_features(folder):
    tokenizer = tiny_tokenizer()
    model, bundle = tiny_model(tokenizer), load_bundle(folder)
    images, tokens = pixels(bundle), tokenizer.encode(TEXTS)
    assert bundle.model.encode_image(images).equal(model.encode_image(images))
    assert bundle.model.encode_text(tokens).equal(model.encode_text(tokens))
    assert bundle.model.logit_scale.equal(model.logit_scale)
    assert bundle.tokenizer.encode(TEXTS).ids.equal(tokens.ids)
    assert bundle.languages == ("zh", "en")
    assert not bundle.model.training


def test_the_transform_is_the_one_that_was_saved(tmp_path):
    tokenizer = tiny_tokenizer()
    changes = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "resize_mode": "squash"}
    save(tmp_path / "bundle", tiny_model(tokenizer), tokenizer, **changes)
    transform = load_bundle(tmp_path / "bundle").transform
    tensor = transform(make_image(0, size=(64, 32)))
    resized = make_image(0, size=(64, 32)).resize((32, 32), resample=3)
    expected = torch.tensor(list(resized.tobytes())).view(32, 32, 3).permute(2, 0, 1)
    torch.testing.assert_close(tensor, (expected / 255 - 0.5) / 0.25)


def test_the_same_bundle_has_the_same_fingerprint_wherever_it_lies(folder, copy, tmp_path):
    bundle = load_bundle(folder)
    assert load_bundle(copy).fingerprint == bundle.fingerprint
    assert load_bundle(tiny_bundle(tmp_path / "a")).fingerprint == bundle.fingerprint
    save_bundle(
        tmp_path / "again",
        model=bundle.model,
        model_cfg=dict(reversed(bundle.model_cfg.items())),  # the order of names says nothing
        preprocess_cfg=bundle.preprocess_cfg,
        tokenizer=bundle.tokenizer,
        languages=("en",),
    )
    assert load_bundle(tmp_path / "again").fingerprint == bundle.fingerprint


def test_other_weights_have_another_fingerprint(folder, tmp_path):
    other = load_bundle(tiny_bundle(tmp_path / "other", seed=1))
    assert load_bundle(folder).fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["model_cfg"]["text_cfg"].update(heads=4),
        lambda record: record["model_cfg"].update(quick_gelu=True),
        lambda record: record["preprocess_cfg"].update(mean=[0.5, 0.5, 0.5]),
    ],
    ids=["heads", "activation", "transform"],
)
def test_equal_weights_that_give_other_vectors_have_another_fingerprint(folder, copy, change):
    change_json(copy / "open_clip_config.json", change)
    one, other = load_bundle(folder), load_bundle(copy)
    assert (copy / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    tokens, images = one.tokenizer.encode(TEXTS), pixels(one)
    with torch.inference_mode():
        texts = [each.model.encode_text(tokens) for each in (one, other)]
    assert not (texts[0].equal(texts[1]) and images.equal(pixels(other)))
    assert one.fingerprint != other.fingerprint


def test_another_tokenizer_has_another_fingerprint(folder, tmp_path):
    longer, model = tiny_tokenizer(context_length=12), tiny_model(tiny_tokenizer())
    bundle = load_bundle(folder)
    save_bundle(
        tmp_path / "bundle",
        model=model,
        model_cfg=bundle.model_cfg,
        preprocess_cfg=bundle.preprocess_cfg,
        tokenizer=longer,
        languages=("zh", "en"),
    )
    assert (tmp_path / "bundle" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert load_bundle(tmp_path / "bundle").fingerprint != bundle.fingerprint


def test_a_calibration_does_not_change_the_fingerprint(copy):
    before = load_bundle(copy).fingerprint
    calibration = Calibration(
        cosines=(0.0, 0.5), probabilities=(0.1, 0.9), prior=0.5, threshold=0.3, precision=0.9,
        dim=32, fingerprint=before, fitted_on={},
    )  # fmt: skip
    store_calibration(copy, calibration)
    assert load_bundle(copy).fingerprint == before
    change_json(
        copy / "open_clip_config.json",
        lambda record: record["model_cfg"]["text_cfg"].update(heads=4),
    )
    for use in (load_bundle, lambda folder: store_calibration(folder, calibration)):
        with pytest.raises(
            CheckpointError, match=rf"the calibration .* \({before[:12]}\) than its"
        ):
            use(copy)


def test_a_saved_model_stays_usable_and_unchanged(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(tmp_path / "bundle", model, tokenizer)
    assert model.training
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_bundle_replaces_the_one_that_was_there(copy):
    (copy / "notes.txt").write_text("old")
    before = load_bundle(copy).fingerprint
    tokenizer = tiny_tokenizer()
    save(copy, tiny_model(tokenizer, seed=1), tokenizer)
    assert load_bundle(copy).fingerprint != before
    assert not (copy / "notes.txt").exists()


@pytest.mark.usefixtures("no_network")
@torch.inference_mode()
def test_open_clip_reads_a_bundle_and_gives_the_same_features(folder):
    bundle = load_bundle(folder)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    image = make_image(1, size=(60, 40))
    assert transform(image).equal(bundle.transform(image))
    images = pixels(bundle)
    features = F.normalize(model.encode_image(images), dim=-1)
    torch.testing.assert_close(features, bundle.model.encode_image(images), atol=1e-5, rtol=0)

    tokens = bundle.tokenizer.encode(TEXTS)
    room = bundle.tokenizer.context_length - tokens.ids.shape[1]
    assert room > 0  # our own batch is shorter than the context that open_clip needs
    whole = F.pad(tokens.ids, (0, room), value=bundle.tokenizer.special_ids.padding)
    features = F.normalize(model.encode_text(whole), dim=-1)
    torch.testing.assert_close(features, bundle.model.encode_text(tokens), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logit_scale.exp(), bundle.model.logit_scale)


@pytest.mark.usefixtures("no_network")
def test_the_bias_of_a_sigmoid_loss_is_kept_and_open_clip_reads_it(tmp_path):
    tokenizer = tiny_tokenizer()
    config = replace(TINY_MODEL, init_logit_bias=-10.0)
    model = build_from_config(config, tokenizer)
    with torch.no_grad():
        model.logit_bias.fill_(-7.5)
    save_bundle(
        tmp_path / "bundle",
        model=model,
        model_cfg=encoder_model_cfg(config, tokenizer),
        preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
        tokenizer=tokenizer,
        languages=("zh", "en"),
    )
    assert load_bundle(tmp_path / "bundle").model.logit_bias.item() == -7.5
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'bundle'}")
    assert theirs.logit_bias.item() == -7.5


MULTIWAY = MultiwayConfig(
    image_size=IMAGE_SIZE, patch_size=16, width=32, heads=2, ffn_width=64, layers=1, vl_layers=1,
    embed_dim=24, text_positions=20,
)  # fmt: skip


def save_cfg(folder, cfg, tokenizer, **changes):
    """Write a bundle of the model that `cfg` describes; return the model."""
    torch.manual_seed(0)
    model = build_encoder(cfg).eval()
    save_bundle(
        folder,
        model=model,
        model_cfg=cfg,
        preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
        tokenizer=tokenizer,
        languages=("zh", "en"),
        **changes,
    )
    return model


@torch.inference_mode()
def same_features(bundle, model):
    tokens = bundle.tokenizer.encode(TEXTS)
    assert bundle.model.encode_text(tokens).equal(model.encode_text(tokens))
    assert bundle.model.encode_image(pixels(bundle)).equal(model.encode_image(pixels(bundle)))


@pytest.mark.usefixtures("no_network")
def test_multiway_towers_are_described_where_open_clip_does_not_look(tmp_path):
    tokenizer = tiny_tokenizer()
    cfg = encoder_model_cfg(ModelConfig(multiway=MULTIWAY), tokenizer)
    model = save_cfg(tmp_path / "bundle", cfg, tokenizer)
    bundle = load_bundle(tmp_path / "bundle")
    same_features(bundle, model)
    assert bundle.model_cfg == cfg
    assert not (tmp_path / "bundle/open_clip_config.json").exists()
    config = json.loads((tmp_path / "bundle/model_config.json").read_text())
    assert config.keys() == {"model_cfg", "preprocess_cfg"}


@pytest.mark.parametrize("damage", ["field", "file"])
def test_a_damaged_description_of_multiway_towers_is_named(tmp_path, damage):
    tokenizer = tiny_tokenizer()
    cfg = encoder_model_cfg(ModelConfig(multiway=MULTIWAY), tokenizer)
    save_cfg(tmp_path / "bundle", cfg, tokenizer)
    path = tmp_path / "bundle/model_config.json"
    if damage == "file":
        path.write_text("{")
    else:
        change_json(path, lambda record: record["model_cfg"]["multiway"].update(heads=5))
    with pytest.raises(CheckpointError, match=r"model_config\.json"):
        load_bundle(tmp_path / "bundle")


@pytest.mark.usefixtures("no_network")
def test_a_text_tower_of_transformers_needs_no_network_and_keeps_to_open_clips_fields(tmp_path):
    tokenizer = tiny_tokenizer()
    bert = {
        "model_type": "bert", "vocab_size": tokenizer.vocab_size, "hidden_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
        "pad_token_id": tokenizer.special_ids.padding,
    }  # fmt: skip
    text_cfg = {
        "hf_model_name": "nobody/no-such-model", "hf_proj_type": "linear",
        "hf_pooler_type": "cls_last_hidden_state_pooler", "hf_config": bert,
    }  # fmt: skip
    vision_cfg = {"image_size": IMAGE_SIZE, "layers": 1, "width": 64, "patch_size": 16}
    cfg = {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg, "custom_text": True}
    model = save_cfg(tmp_path / "bundle", cfg, tokenizer)
    bundle = load_bundle(tmp_path / "bundle")
    same_features(bundle, model)
    assert bundle.model_cfg == cfg
    theirs = json.loads((tmp_path / "bundle/open_clip_config.json").read_text())
    assert "hf_config" not in theirs["model_cfg"]["text_cfg"]
    assert json.loads((tmp_path / "bundle/vlm.json").read_text())["hf_config"] == bert
    change_json(
        tmp_path / "bundle/vlm.json", lambda record: record["hf_config"].update(hidden_act="relu")
    )
    assert load_bundle(tmp_path / "bundle").fingerprint != bundle.fingerprint


@pytest.mark.parametrize("widths", [(), (8, 16)])
def test_the_widths_that_features_were_trained_at_are_kept(tmp_path, widths):
    tokenizer = tiny_tokenizer()
    cfg = encoder_model_cfg(TINY_MODEL, tokenizer)
    save_cfg(tmp_path / "bundle", cfg, tokenizer, truncate_dims=widths)
    assert load_bundle(tmp_path / "bundle").truncate_dims == widths


@pytest.mark.usefixtures("no_network")
def test_reading_asks_for_no_network_even_for_a_tower_that_began_with_published_weights(copy):
    def pretend(record):
        record["model_cfg"]["vision_cfg"]["timm_model_pretrained"] = True

    change_json(copy / "open_clip_config.json", pretend)
    embedder = Embedder.load(copy, device="cpu")
    assert embedder.encode_image([encoded(make_image(0))]).shape == (1, 32)


def test_weights_are_stored_as_float32_under_open_clips_names(folder):
    weights = load_file(folder / WEIGHTS)
    assert "logit_scale" in weights
    assert "log_logit_scale" not in weights
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "no folder"])
def test_a_folder_that_is_no_bundle_is_named(tmp_path, there):
    folder = tmp_path if there else tmp_path / "gone"
    with pytest.raises(CheckpointError, match=rf"{folder} is not a bundle: it has no vlm\.json"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["vlm.json", "open_clip_config.json", WEIGHTS])
@pytest.mark.parametrize("damage", ["missing", "empty", "half"])
def test_a_missing_or_damaged_part_is_named(copy, name, damage):
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["vlm_tokenizer.json", "sentencepiece.model"])
@pytest.mark.parametrize("damage", ["missing", "half"])
def test_a_missing_or_damaged_tokenizer_is_refused(copy, name, damage):
    path = copy / "tokenizer" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(VlmError, match=r"tokenizer|SentencePiece"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["vlm.json", "open_clip_config.json"])
@pytest.mark.parametrize("text", ["[]", "null", '"text"', "3"])
def test_a_description_that_is_no_object_is_named(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{copy / name} holds no JSON object"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("vlm.json", "format"),
        ("vlm.json", "tokenizer"),
        ("vlm.json", "languages"),
        ("open_clip_config.json", "model_cfg"),
        ("open_clip_config.json", "preprocess_cfg"),
    ],
)
def test_a_description_without_a_field_says_which(copy, name, field):
    change_json(copy / name, lambda record: record.pop(field))
    with pytest.raises(CheckpointError, match=f"the descriptions in {copy} lack '{field}'"):
        load_bundle(copy)


def test_another_format_is_refused_with_both_numbers(copy):
    change_json(copy / "vlm.json", lambda record: record.update(format=2))
    with pytest.raises(CheckpointError, match="has bundle format 2; this version reads 1"):
        load_bundle(copy)


@pytest.mark.parametrize("changes", [{"context_length": 12}, {"vocab_size": 319}], ids=str)
def test_another_tokenizer_is_refused_with_both_fingerprints(copy, folder, changes):
    other = tiny_tokenizer(**changes)
    other.save(copy / "tokenizer")
    own = load_bundle(folder).tokenizer.fingerprint
    said = rf"another tokenizer \({other.fingerprint[:12]}\) .* \({own[:12]}\)"
    with pytest.raises(TokenizerError, match=said):
        load_bundle(copy)


def drop(weights):
    del weights["text.positional_embedding"]


def add(weights):
    weights["text.extra"] = torch.zeros(2)


def reshape(weights):
    weights["text.text_projection"] = torch.zeros(64, 33)


def rename(weights):
    weights["visual.trunc"] = weights.pop("logit_scale")


@pytest.mark.parametrize(
    ("change", "count", "name"),
    [
        (drop, 1, "text.positional_embedding"),
        (add, 1, "text.extra"),
        (reshape, 1, "text.text_projection"),
        (rename, 2, "log_logit_scale, visual.trunc"),
    ],
    ids=["missing", "unexpected", "another shape", "renamed"],
)
def test_weights_that_do_not_fit_are_named(copy, change, count, name):
    weights = load_file(copy / WEIGHTS)
    change(weights)
    save_file(weights, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{count} tensors are missing, .* \({name}\)"):
        load_bundle(copy)


def test_many_wrong_weights_are_counted_and_the_first_named(copy):
    save_file({"other": torch.zeros(1)}, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"\d\d+ tensors are missing, .* \(\S+, \S+, \S+, "):
        load_bundle(copy)


def test_weights_of_another_vocabulary_are_refused(copy):
    def shrink(record):
        record["model_cfg"]["text_cfg"]["vocab_size"] = 300

    change_json(copy / "open_clip_config.json", shrink)
    with pytest.raises(CheckpointError, match=r"\(text\.token_embedding\.weight\)"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("tower", "field", "value", "said"),
    [
        ("vision_cfg", "timm_model_name", "no_such_model", "timm has no model 'no_such_model'"),
        ("text_cfg", "no_such_field", 1, "the towers cannot be built"),
        ("text_cfg", "pool_type", "none", "the text tower pools by 'none'"),
        ("text_cfg", "heads", 0, "describes no model"),
    ],
    ids=["unknown image tower", "unknown field", "another pooling", "no heads"],
)
def test_a_model_that_cannot_be_built_says_why(copy, tower, field, value, said):
    change_json(
        copy / "open_clip_config.json",
        lambda record: record["model_cfg"][tower].update({field: value}),
    )
    with pytest.raises(CheckpointError, match=said):
        load_bundle(copy)


def test_preprocessing_is_never_guessed(copy):
    change_json(copy / "open_clip_config.json", lambda record: record["preprocess_cfg"].pop("mean"))
    with pytest.raises(CheckpointError, match="the image preprocessing lacks mean"):
        load_bundle(copy)


def test_weights_with_executable_content_are_not_run(copy, tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "pickle")
    (copy / WEIGHTS).write_bytes((tmp_path / "pickle").read_bytes())
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        load_bundle(copy)
