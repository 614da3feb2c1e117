"""M2-Encoder's checkpoints become bundles and come back, name by name."""

import io
from dataclasses import replace

import pytest
import sentencepiece
import torch

from tests.builders import THING_TEXTS
from tests.checkpoints.sources import TEXTS, disturb, pixels
from vlm.bundle import load_bundle
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.conversion import convert
from vlm.checkpoints.export import export
from vlm.checkpoints.m2_encoder import multiway_config
from vlm.errors import CheckpointError, ConfigError, TokenizerError
from vlm.models.multiway import MultiwayEncoder
from vlm.models.multiway_config import MultiwayConfig, is_held, released_tensors
from vlm.text.importing import import_tokenizer

SIZES = MultiwayConfig(
    image_size=32, patch_size=8, width=128, heads=2, ffn_width=256, layers=2, vl_layers=1,
    embed_dim=48, text_positions=70,
)  # fmt: skip
ENDS = ["<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]"]
BLANKS = [f"<|blank_{length}|>" for length in range(2, 11)]


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    """A vocabulary with GLM's special pieces, small."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(THING_TEXTS["zh"] + THING_TEXTS["en"]), model_writer=buffer,
        model_type="bpe", vocab_size=220, user_defined_symbols=ENDS + BLANKS,
        hard_vocab_limit=False, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("glm") / "sp.model"
    path.write_bytes(buffer.getvalue())
    return path


def released(glm, config=SIZES):
    """Return tensors under every name of a released checkpoint."""
    vocabulary = len(sentencepiece.SentencePieceProcessor(model_file=str(glm)))
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.1 * torch.randn(shape, generator=generator)
        for name, shape in released_tensors(config, vocabulary).items()
    }


def converted(glm, folder, tensors=None, **options):
    """Convert a checkpoint as it is released, into the folder's `bundle`, and read that."""
    torch.save(released(glm) if tensors is None else tensors, folder / "m2.ckpt")
    config = ConversionConfig(**{"tokenizer": str(glm), "heads": 2} | options)
    convert(folder / "m2.ckpt", folder / "bundle", config)
    return load_bundle(folder / "bundle")


def test_the_sizes_follow_from_the_shapes(glm):
    assert multiway_config(released(glm), heads=2) == SIZES


@pytest.mark.parametrize(
    ("width", "heads", "layers"), [(768, 12, 9), (1024, 16, 21), (4096, 32, 21)]
)
def test_the_published_sizes_follow_from_the_shapes(width, heads, layers):
    published = MultiwayConfig(
        width=width, heads=heads, ffn_width=4 * width, layers=layers, embed_dim=min(width, 1024)
    )
    shapes = released_tensors(published, 115_244)
    assert multiway_config({n: torch.empty(s, device="meta") for n, s in shapes.items()}) == (
        published
    )


@pytest.mark.parametrize("key", ["state_dict", "module", "model", None])
def test_a_checkpoint_round_trips_name_by_name(glm, tmp_path, key):
    theirs = released(glm)
    stored = {f"_forward_module.{name}": tensor for name, tensor in theirs.items()}
    stored["_forward_module.visual_tokenizer.codebook.weight"] = torch.zeros(4, 4)
    torch.save({key: stored} if key else stored, tmp_path / "m2.ckpt")
    config = ConversionConfig(tokenizer=str(glm), heads=2)
    said = convert(tmp_path / "m2.ckpt", tmp_path / "bundle", config)
    held = {name for name in theirs if is_held(name)}
    dropped = {"visual_tokenizer.codebook.weight", *theirs} - held
    assert f"left out {len(dropped)} tensors on purpose" in said[1]
    assert all(name in said[1] for name in dropped)

    bundle = load_bundle(tmp_path / "bundle")
    said = export(bundle, tmp_path / "back.ckpt", "m2")
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    assert back.keys() == held
    assert all(back[name].equal(theirs[name]) for name in held)
    assert all(name in said[1] for name in theirs.keys() - held)
    again = ConversionConfig(tokenizer=str(glm), heads=2)
    convert(tmp_path / "back.ckpt", tmp_path / "twice", again)
    assert load_bundle(tmp_path / "twice").fingerprint == bundle.fingerprint


def test_a_width_that_is_not_published_asks_for_the_heads(glm, tmp_path):
    with pytest.raises(CheckpointError, match=r"128 wide, .* expected --heads, or a width of 768"):
        converted(glm, tmp_path, heads=None)


def test_heads_that_no_shape_shows_come_back_by_the_option(glm, tmp_path):
    torch.save(released(glm), tmp_path / "m2.ckpt")
    config = ConversionConfig(tokenizer=str(glm), heads=4)
    convert(tmp_path / "m2.ckpt", tmp_path / "bundle", config)
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.model.config == replace(SIZES, heads=4)
    assert "read it with --heads 4" in export(bundle, tmp_path / "back.ckpt", "m2")[0]
    convert(tmp_path / "back.ckpt", tmp_path / "twice", config)
    assert load_bundle(tmp_path / "twice").fingerprint == bundle.fingerprint


def test_heads_of_a_published_width_are_not_written_otherwise(glm, tmp_path):
    bundle = converted(glm, tmp_path)
    bundle.model.config = replace(SIZES, width=768, heads=24)
    with pytest.raises(CheckpointError, match="cannot express 24 attention heads"):
        export(bundle, tmp_path / "back.ckpt", "m2")
    assert not (tmp_path / "back.ckpt").exists()


def test_a_folder_is_no_place_for_a_file(glm, tmp_path):
    bundle = converted(glm, tmp_path)
    with pytest.raises(CheckpointError, match="is a folder; expected a file to write"):
        export(bundle, tmp_path, "m2")


@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_context_too_short_for_any_text_is_refused(glm, tmp_path, length):
    with pytest.raises(TokenizerError, match=f"context_length is {length}; expected"):
        converted(glm, tmp_path, context_length=length)


@torch.inference_mode()
def test_the_bundle_is_the_model_with_those_tensors(glm, tmp_path):
    theirs = released(glm)
    vocabulary = len(theirs["backbone.text_embed.weight"])
    model = disturb(MultiwayEncoder(SIZES, vocab_size=vocabulary))
    names = {"log_logit_scale": "logit_vl_scale", "log_unimodal_logit_scale": "logit_scale"}
    model.load_state_dict({n: theirs[names.get(n, n)] for n in model.state_dict()})
    bundle = converted(glm, tmp_path, theirs)
    tokens = bundle.tokenizer.encode(TEXTS)
    assert bundle.model.encode_text(tokens).equal(model.encode_text(tokens))
    assert bundle.model.encode_image(pixels(bundle)).equal(model.encode_image(pixels(bundle)))
    assert not (tmp_path / "bundle/open_clip_config.json").exists()
    assert bundle.preprocess_cfg["resize_mode"] == "squash"
    assert bundle.preprocess_cfg["mean"] == [0.5, 0.5, 0.5]
    assert bundle.languages == ("zh", "en")


def test_texts_stand_between_glms_pieces_and_lose_their_head(glm, tmp_path):
    bundle = converted(glm, tmp_path)
    tokenizer = bundle.tokenizer
    model = sentencepiece.SentencePieceProcessor(model_file=str(glm))
    text = "red apple " * 40 + "blue  sea"
    rows = tokenizer.encode([text, "blue  sea"])
    assert rows.ids.shape[1] == 52
    begin, end = (model.piece_to_id(piece) for piece in ("[CLS]", "<|endoftext|>"))
    pieces = model.encode(text.replace("  ", "<|blank_2|>"))
    assert rows.ids[0].tolist() == [begin, *pieces[-50:], end]
    short = model.encode("blue<|blank_2|>sea")
    padding = [end] * (52 - len(short) - 2)
    assert rows.ids[1].tolist() == [begin, *short, end, *padding]


@torch.inference_mode()
def test_positions_are_interpolated_for_another_image_size(glm, tmp_path):
    theirs = released(glm)
    bundle = converted(glm, tmp_path, theirs, image_size=48)
    assert bundle.model.grid_size == (6, 6)
    assert bundle.model.encode_image(pixels(bundle)).shape == (3, 48)
    assert bundle.preprocess_cfg["size"] == 48
    name = "backbone.encoder.embed_positions.A.weight"
    old, new = theirs[name], bundle.model.state_dict()[name]
    assert new.shape == (39, 128)
    assert new[:3].equal(old[:3])
    torch.testing.assert_close(new[3], old[3])  # the first new patch lies in the first old one


def test_an_image_size_that_patches_do_not_fill_is_refused(glm, tmp_path):
    with pytest.raises(ConfigError, match="expected a multiple of patch_size"):
        converted(glm, tmp_path, image_size=47)


def test_a_checkpoint_asks_for_its_tokenizer(glm, tmp_path):
    torch.save(released(glm), tmp_path / "m2.ckpt")
    with pytest.raises(CheckpointError, match=r"name its sp\.model with --tokenizer"):
        convert(tmp_path / "m2.ckpt", tmp_path / "bundle", ConversionConfig(heads=2))


def test_an_unexpected_or_missing_tensor_is_named(glm, tmp_path):
    theirs = released(glm) | {"decoder.weight": torch.zeros(1)}
    del theirs["logit_vl_scale"]
    with pytest.raises(CheckpointError, match=r"\(logit_vl_scale\), .* \(decoder\.weight\)"):
        converted(glm, tmp_path, theirs)


@pytest.mark.parametrize("target", ["open_clip", "hf", "chinese-clip"])
def test_other_formats_cannot_express_multiway_towers(glm, tmp_path, target):
    torch.save(released(glm), tmp_path / "m2.ckpt")
    config = ConversionConfig(tokenizer=str(glm), heads=2)
    with pytest.raises(CheckpointError, match="cannot express multiway towers"):
        convert(tmp_path / "m2.ckpt", tmp_path / "out", config, target=target)
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_recognised_by_its_pieces(glm):
    config = import_tokenizer(str(glm)).config
    assert (config.begin_of_text, config.end_of_text) == ("[CLS]", "<|endoftext|>")
    assert (config.context_length, config.truncation, config.cleaning) == (52, "left", "glm")
    assert import_tokenizer(str(glm), context_length=60).config.context_length == 60


def test_weights_that_are_no_numbers_are_refused(glm, tmp_path):
    theirs = released(glm)
    theirs["itc_vl_image_proj.fc.weight"][3, 4] = torch.nan
    with pytest.raises(CheckpointError, match=r"NaN or an infinity in itc_vl_image_proj\.fc"):
        converted(glm, tmp_path, theirs)
