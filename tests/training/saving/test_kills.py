"""A run that is killed, however often, ends as one that was left alone: bit for bit."""

import random
from dataclasses import replace

import pytest

from tests.support.training_runs import fit, left_by, tiny_config, tiny_inputs, trained_on
from vlm.losses.plan import LossConfig
from vlm.training.config import OptimizerConfig

STEPS = 7


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0)])
def test_killed_twice_it_leaves_the_same_weights_losses_and_scores(
    inputs, tmp_path, ranks, workers
):
    """With averages, micro-batches, evaluations, epochs' ends, and writing in the background."""
    config = tiny_config(inputs, tmp_path / "whole", steps=STEPS, workers=workers)
    fit(config, ranks=ranks, uids=tmp_path / "whole.uids")
    expected = left_by(config)
    assert {"model.safetensors", "optimizer.safetensors", "ema.safetensors"} == set(
        expected["hashes"]
    )
    assert len(expected["records"]) >= STEPS
    config = replace(config, run_folder=tmp_path / "killed")
    for kill_at in (*sorted(random.Random(ranks).sample(range(STEPS), 2)), None):
        fit(config, ranks=ranks, kill_at=kill_at, uids=tmp_path / "killed.uids")
    assert left_by(config) == expected
    assert trained_on(tmp_path / "killed.uids") == trained_on(tmp_path / "whole.uids")


@pytest.mark.slow
def test_killed_while_it_is_scored_it_has_the_scores_in_the_end(inputs, tmp_path):
    config = tiny_config(inputs, tmp_path / "whole", steps=STEPS)
    fit(config)
    killed = replace(config, run_folder=tmp_path / "killed")
    for scored in (4, STEPS):
        fit(killed, kill_in_scores_of=scored)
    fit(killed)
    assert left_by(killed) == left_by(config)


@pytest.mark.slow
@pytest.mark.distributed
def test_another_number_of_ranks_trains_on_the_same_batches(inputs, tmp_path):
    # Batch norm sees micro-batches, which are other ones on two ranks; and Adam's first steps are
    # as large for a gradient that is a rounding error as for any other.
    changes = {"loss": LossConfig(), "optimizer": OptimizerConfig(learning_rate=1e-5)}
    config = replace(tiny_config(inputs, tmp_path / "whole", steps=STEPS), **changes)
    fit(config, uids=tmp_path / "whole.uids")
    elastic = replace(config, run_folder=tmp_path / "elastic")
    for ranks, kill_at in ((1, 3), (2, 6), (1, None)):
        fit(elastic, ranks=ranks, kill_at=kill_at, uids=tmp_path / "elastic.uids")
    assert trained_on(tmp_path / "elastic.uids") == trained_on(tmp_path / "whole.uids")
    expected, found = left_by(config), left_by(elastic)
    assert found["state"]["data"] == expected["state"]["data"]
    for one, other in zip(expected["records"], found["records"], strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5), one["step"]
