import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from tests.builders import (
    IMAGE_SIZE,
    THINGS,
    TINY_MODEL,
    make_samples,
    tiny_bundle,
    tiny_model,
    tiny_tokenizer,
    write_split,
)
from tests.models.test_pretraining import TINY_MULTIWAY
from tests.support.processes import run_in_world
from vlm.batches.batch import Batch
from vlm.batches.collate import MaskPlan, draw_patches
from vlm.batches.config import DataConfig
from vlm.embedding.embedder import Embedder
from vlm.errors import ConfigError, VlmError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.losses.bilingual import BilingualLoss
from vlm.losses.plan import LossConfig
from vlm.models.build import build_from_config
from vlm.models.config import MaskedConfig
from vlm.training.build import build_run
from vlm.training.config import (
    AdaptationConfig,
    CheckpointConfig,
    ObjectivesConfig,
    ScheduleConfig,
    TrainConfig,
)
from vlm.training.objectives import build_pretraining_model, loss_weights, mask_plan
from vlm.training.step import ContrastiveStep

LANGUAGES = {"zh": "zh", "en": "en"}
BOTH = MaskedConfig(cmlm_weight=0.5, cmim_weight=2.0, image_ratio=0.6, decoder_layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("objectives") / "data", make_samples(12))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    tiny_tokenizer().save(folder)
    return folder


def config(data, tokenizer, run_folder, **changes):
    settings = {
        "run_folder": run_folder,
        "tokenizer": tokenizer,
        "model": TINY_MODEL,
        "data": DataConfig(folder=data, batch_size=6, workers=0),
        "schedule": ScheduleConfig(steps=4, warmup_steps=1),
        "checkpoint": CheckpointConfig(every_steps=0),
        "report_every": 1,
    }
    return TrainConfig(**(settings | changes))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("model", [TINY_MODEL, TINY_MULTIWAY], ids=["two towers", "multiway"])
def test_every_objective_is_trained_reported_apart_and_left_out_of_the_bundle(
    data, tokenizer, tmp_path, model
):
    objectives = ObjectivesConfig(
        masked=BOTH, matryoshka=(8,), language_embeddings=True, unimodal_weight=0.5
    )
    folder = tmp_path / "run"
    bundle = build_run(config(data, tokenizer, folder, model=model, objectives=objectives)).fit()
    heads = {"main": 1.0, "main_8": 1.0}
    heads |= {"unimodal": 0.5} if model is TINY_MULTIWAY else {}
    for record in records(folder):
        of_heads = sum(weight * record[f"loss/{name}"] for name, weight in heads.items())
        expected = of_heads / sum(heads.values())
        expected += 0.5 * record["loss/cmlm"] + 2.0 * record["loss/cmim"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    names = load_file(bundle / "open_clip_model.safetensors").keys()
    assert not any(
        "decoder" in name or "masked" in name or "encoder." in name[:8] for name in names
    )
    whole, cut = (Embedder.load(bundle, truncate_dim=dim) for dim in (None, 8))
    vectors = whole.encode_text(["red apple"])[:, :8]
    found = cut.encode_text(["red apple"])
    torch.testing.assert_close(
        torch.from_numpy(found), torch.nn.functional.normalize(torch.from_numpy(vectors), dim=1)
    )
    with pytest.raises(VlmError, match="truncate_dim is 9; expected 8 or"):
        whole.truncated(9)


@pytest.mark.slow
@pytest.mark.parametrize("model", [TINY_MODEL, TINY_MULTIWAY], ids=["two towers", "multiway"])
def test_micro_batches_give_the_losses_of_one_batch(data, tokenizer, tmp_path, model):
    """The masks of a sample follow from the seed and the sample, and not from its batch."""
    found = []
    for parts in (1, 2):
        folder = tmp_path / f"run{parts}"
        settings = {
            "model": model,
            "loss": LossConfig(micro_batches=parts),
            "objectives": ObjectivesConfig(masked=BOTH),
            "adapt": AdaptationConfig(image_unlocked_groups=0),  # no batch norm over parts
        }
        build_run(config(data, tokenizer, folder, **settings)).fit()
        found.append(records(folder)[0])
    for name in ("loss/main", "loss/cmim"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


@pytest.mark.slow
def test_a_run_with_adapters_and_objectives_resumes_to_the_same_bundle(data, tokenizer, tmp_path):
    settings = {
        "objectives": ObjectivesConfig(masked=BOTH, language_embeddings=True),
        "adapt": AdaptationConfig(lora_rank=2, lora_towers=("text",)),
        "checkpoint": CheckpointConfig(every_steps=2, keep=9),
    }
    whole = build_run(config(data, tokenizer, tmp_path / "whole", **settings)).fit()
    cut = config(data, tokenizer, tmp_path / "cut", **settings)
    build_run(cut).fit()
    last = tmp_path / "cut/checkpoints/step-00000004"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    resumed = build_run(cut, resume="auto").fit()
    first, second = (load_file(b / "open_clip_model.safetensors") for b in (whole, resumed))
    assert first.keys() == second.keys()
    assert not any("lora" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_teachers_states_are_what_hidden_patches_are_recovered_as(tmp_path):
    teacher = tiny_bundle(tmp_path / "teacher", seed=5)
    tokenizer = tiny_tokenizer()
    encoder = tiny_model(tokenizer)
    masked = MaskedConfig(cmim_weight=1.0, teacher=teacher, decoder_layers=1)
    model = build_pretraining_model(
        encoder,
        ObjectivesConfig(masked=masked),
        languages=LANGUAGES,
        preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
    )
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    expected = tiny_model(tokenizer, seed=5).image_states(images).tokens
    torch.testing.assert_close(model.teacher(images), expected)
    assert not any("teacher" in name for name in model.state_dict())


def test_a_teacher_of_other_images_is_refused(tmp_path):
    masked = MaskedConfig(cmim_weight=1.0, teacher=tiny_bundle(tmp_path / "teacher"))
    with pytest.raises(ConfigError, match="teacher's images differ from the run's: size 32 for 64"):
        build_pretraining_model(
            tiny_model(tiny_tokenizer()),
            ObjectivesConfig(masked=masked),
            languages=LANGUAGES,
            preprocess_cfg=preprocess_cfg(PreprocessConfig(), 64),
        )


def test_a_teacher_of_other_patches_is_refused(tmp_path):
    masked = MaskedConfig(cmim_weight=1.0, teacher=tiny_bundle(tmp_path / "teacher"))
    with pytest.raises(ConfigError, match="teacher has 1 x 1 patches; expected the model's 2 x 2"):
        build_pretraining_model(
            build_from_config(TINY_MULTIWAY, tiny_tokenizer()),
            ObjectivesConfig(masked=masked),
            languages=LANGUAGES,
            preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
        )


def test_a_teacher_is_not_read_where_no_patches_are_hidden(tmp_path):
    masked = MaskedConfig(cmlm_weight=1.0, teacher=tmp_path / "none", decoder_layers=1)
    model = build_pretraining_model(
        tiny_model(tiny_tokenizer()),
        ObjectivesConfig(masked=masked),
        languages=LANGUAGES,
        preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
    )
    assert model.teacher is None


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_of_the_second_head_below_zero_is_refused(weight):
    with pytest.raises(ConfigError, match=r"unimodal_weight is .*; expected at least 0"):
        ObjectivesConfig(unimodal_weight=weight)


def test_patch_dropout_beside_masked_modelling_is_refused(data, tokenizer, tmp_path):
    settings = {
        "model": TINY_MULTIWAY,
        "objectives": ObjectivesConfig(masked=BOTH),
        "adapt": AdaptationConfig(patch_dropout=0.5),
    }
    with pytest.raises(ConfigError, match=r"patch_dropout is 0\.5, but masked modelling reads"):
        build_run(config(data, tokenizer, tmp_path / "run", **settings)).fit()
    assert not (tmp_path / "run").exists()


def test_a_ratio_that_hides_no_patch_is_refused():
    masked = MaskedConfig(cmim_weight=1.0, image_ratio=0.4)
    with pytest.raises(ConfigError, match=r"0\.4 of 1 patches rounds to 0"):
        mask_plan(masked, tiny_model(tiny_tokenizer()))


def test_only_what_is_trained_is_hidden():
    encoder = tiny_model(tiny_tokenizer())
    assert mask_plan(MaskedConfig(), encoder) == MaskPlan()
    words = mask_plan(MaskedConfig(cmlm_weight=1.0, text_ratio=0.3), encoder)
    assert words == MaskPlan(text_ratio=0.3)
    both = mask_plan(BOTH, encoder)
    assert both == MaskPlan(text_ratio=0.5, image_ratio=0.6, grid=(1, 1))


def test_dropped_patches_do_not_go_with_masked_modelling(data, tokenizer, tmp_path):
    settings = {"objectives": ObjectivesConfig(masked=BOTH), "model": TINY_MULTIWAY}
    adapted = AdaptationConfig(patch_dropout=0.5)
    with pytest.raises(ConfigError, match="masked modelling reads every patch"):
        build_run(config(data, tokenizer, tmp_path / "run", adapt=adapted, **settings)).fit()


# The first rank of two has no English, and some micro-batches lack a language.
THERE = {
    "all captions": {"zh": [*range(12)], "en": [*range(12)]},
    "one language": {"zh": [0, 1, 2, 4, 5, 11], "en": [6, 7, 8, 11]},
    "no English": {"zh": [0, 3, 4, 9], "en": []},
}


def _gradients(rank, world, parts, there):
    """Return the gradients of this rank's step in which no words are masked."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    encoder = build_from_config(TINY_MULTIWAY, tokenizer)
    masked = MaskedConfig(cmim_weight=2.0, decoder_layers=1)
    objectives = ObjectivesConfig(
        masked=masked, matryoshka=(8,), language_embeddings=True, unimodal_weight=0.5
    )
    model = build_pretraining_model(
        encoder,
        objectives,
        languages=LANGUAGES,
        preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
    ).double()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=torch.float64)
    patches = draw_patches(12, encoder.grid_size, ratio=0.5, generator=generator)
    texts = {
        name: tokenizer.encode([THINGS[row][side] for row in there[name] or [0]])
        for name, side in (("zh", 1), ("en", 0))
    }
    rows = {name: torch.tensor(own or [12]) for name, own in there.items()}
    whole = Batch(
        images=images,
        texts=texts,
        text_rows=rows,
        image_ids=torch.arange(12),
        caption_ids={"zh": rows["zh"] + 100, "en": rows["en"] + 200},
        uids=tuple(map(str, range(12))),
        hidden_patches=patches,
    )
    batches = whole.split(world)[rank].split(parts)

    step = ContrastiveStep(
        wrapped,
        BilingualLoss(text_pair=("zh", "en"), text_pair_weight=0.3),
        weights=loss_weights(objectives),
    )
    step(batches)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.distributed
@pytest.mark.parametrize(("world", "parts"), [(1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("there", THERE.values(), ids=THERE)
def test_ranks_and_micro_batches_give_the_gradients_of_one_batch(world, parts, there):
    """All but those of masked words, whose loss is a mean over a rank's or a part's own."""
    expected = _gradients(0, 1, 1, there)
    assert all(gradient is not None for gradient in expected.values())
    if world == 1:
        found = [_gradients(0, 1, parts, there)]
    else:
        found = run_in_world(_gradients, world, world, parts, there)
    for gradients in found:  # features are float32
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
