"""Batches and images that change their size from stage to stage."""

from dataclasses import replace

import pytest
import torch

from tests.builders import IMAGE_SIZE, TINY_MODEL
from tests.training.optimization.test_stages import config, cut_after, tensors
from tests.training.test_run import losses
from vlm.batches.config import DataConfig, MixtureConfig
from vlm.errors import ConfigError
from vlm.models.config import ImageTowerConfig, MaskedConfig, ModelConfig
from vlm.models.multiway_config import MultiwayConfig
from vlm.training.build import build_run
from vlm.training.config import ObjectivesConfig, StageConfig
from vlm.training.optimization.stages import learning_rate_at

STAGES = (
    StageConfig(steps=2, batch_size=2, image_size=IMAGE_SIZE // 2),
    StageConfig(steps=2, image_size=IMAGE_SIZE * 3 // 4),
    StageConfig(batch_size=8),
)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The folder of a run over all its stages, and the shapes of the images that it read."""
    folder = tmp_path_factory.mktemp("whole")
    run = build_run(config(inputs, folder, stages=STAGES, report_every=1))
    shapes = []

    def step(parts):
        shapes.append(tuple(parts[0].images.shape))
        return run.step(parts)

    replace(run, step=step).fit()
    return folder, shapes, run


def test_every_stage_reads_batches_and_images_of_its_size(whole):
    folder, shapes, run = whole
    assert shapes == [(2, 3, 16, 16)] * 2 + [(4, 3, 24, 24)] * 2 + [(8, 3, 32, 32)] * 2
    assert run.progress.samples == 2 * (2 + 4 + 8) == run.config.samples
    assert list(losses(folder, "candidates").values()) == [2, 2, 4, 4, 8, 8]
    assert "of 2, then 4, then 8 samples (2.3 epochs)" in run.describe()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_resuming_gives_the_same_bits(inputs, whole, tmp_path, stop):
    settings = config(inputs, tmp_path, stages=STAGES)
    cut_after(settings, stop)
    build_run(settings, resume="auto").fit()
    for part in ("model", "optimizer"):
        found, expected = tensors(tmp_path, 6, part), tensors(whole[0], 6, part)
        assert all(torch.equal(found[name], expected[name]) for name in expected), part


MULTIWAY = MultiwayConfig(
    image_size=32, patch_size=8, width=16, heads=2, layers=1, vl_layers=1, embed_dim=8
)
PATCHES = replace(
    TINY_MODEL, vision_cfg=ImageTowerConfig(timm_model_name="test_vit", image_size=32)
)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(multiway=MULTIWAY), "the images are 20 x 20 pixels; expected 32 x 32"),
        (PATCHES, r"cannot read images of 20 pixels: .* expected its own size"),
    ],
    ids=["multiway", "half a patch"],
)
def test_a_tower_that_cannot_read_a_size_is_refused(inputs, tmp_path, model, message):
    stages = (StageConfig(steps=2, image_size=20), StageConfig())
    with pytest.raises(ConfigError, match=message):
        build_run(config(inputs, tmp_path, model=model, stages=stages))


def test_a_stage_that_goes_on_shares_the_schedule_of_the_one_before(inputs, tmp_path):
    shared = (replace(STAGES[0], learning_rate=0.5), StageConfig(steps=3, goes_on=True))
    settings = config(inputs, tmp_path, stages=(*shared, StageConfig(warmup_steps=0)))
    first = StageConfig(steps=5, learning_rate=0.5)
    one = config(inputs, tmp_path, stages=(first, StageConfig(warmup_steps=0)))
    rates = [[learning_rate_at(step, each) for step in range(6)] for each in (settings, one)]
    assert rates[0] == rates[1]
    assert [stage.first for stage in settings.whole_stages] == [0, 2, 5]
    with pytest.raises(ConfigError, match="the first stage has goes_on true"):
        config(inputs, tmp_path, stages=(StageConfig(goes_on=True),))
    with pytest.raises(ConfigError, match="goes_on true, and learning_rate or warmup_steps"):
        StageConfig(goes_on=True, warmup_steps=3)


def test_sizes_that_nothing_else_is_made_for_are_refused(inputs, tmp_path):
    masked = ObjectivesConfig(masked=MaskedConfig(cmlm_weight=1.0))
    with pytest.raises(ConfigError, match="image_size 16, but masked modelling and teachers read"):
        build_run(config(inputs, tmp_path, stages=STAGES, objectives=masked))
    data = DataConfig(
        folder=inputs / "data", batch_size=4, workers=0, mixture=MixtureConfig(batch_by="group")
    )
    with pytest.raises(ConfigError, match="a stage has a batch_size, and batches are of one group"):
        build_run(config(inputs, tmp_path, stages=STAGES, data=data))
    with pytest.raises(ConfigError, match="a stage has batch_size 0; expected at least 1"):
        StageConfig(batch_size=0)
    stages = (StageConfig(steps=2, batch_size=1), StageConfig())
    with pytest.raises(ConfigError, match="compared with one caption alone"):
        build_run(config(inputs, tmp_path, stages=stages))
