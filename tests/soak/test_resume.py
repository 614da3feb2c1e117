"""P1 to P4 in full: kills at random steps, chains of them, and other numbers of ranks."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.support.training_runs import fit, left_by, tiny_config, tiny_inputs, trained_on
from vlm.losses.plan import LossConfig
from vlm.training.config import OptimizerConfig

STEPS, KILLS, CHAINS, LINKS = 7, 20, 10, 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_p1_a_killed_run_resumes_bit_for_bit(inputs, tmp_path, tally, ranks, workers):
    whole = tiny_config(inputs, tmp_path / "whole", steps=STEPS, workers=workers)
    fit(whole, ranks=ranks)
    expected, draw, held = left_by(whole), random.Random(ranks + 10 * workers), 0
    for number in range(KILLS):
        killed = replace(whole, run_folder=tmp_path / str(number))
        fit(killed, ranks=ranks, kill_at=draw.randrange(STEPS))
        fit(killed, ranks=ranks)
        held += left_by(killed) == expected
    what = f"resumes after SIGKILL bit for bit; {ranks} processes, {workers} workers"
    tally("P1", what, held=held, of=KILLS)


def test_p2_resumes_chain(inputs, tmp_path, tally):
    whole = tiny_config(inputs, tmp_path / "whole", steps=STEPS)
    fit(whole)
    expected, draw, held = left_by(whole), random.Random(2), 0
    for number in range(CHAINS):
        killed = replace(whole, run_folder=tmp_path / str(number))
        for kill_at in (*sorted(draw.choices(range(STEPS), k=LINKS)), None):
            fit(killed, kill_at=kill_at)
        held += left_by(killed) == expected
    tally("P2", f"chains of {LINKS} kills that end bit for bit", held=held, of=CHAINS)


def test_p3_no_sample_is_lost_or_read_twice(inputs, tmp_path, tally):
    steps = 3 * KILLS
    whole = tiny_config(inputs, tmp_path / "whole", steps=steps)
    fit(whole, uids=tmp_path / "whole.uids")
    planned, draw = trained_on(tmp_path / "whole.uids"), random.Random(3)
    killed = replace(whole, run_folder=tmp_path / "killed")
    for kill_at in (*sorted(draw.sample(range(steps), KILLS)), None):
        fit(killed, kill_at=kill_at, uids=tmp_path / "killed.uids")
    found = trained_on(tmp_path / "killed.uids")
    samples = sum(map(len, planned.values()))
    held = sum(map(len, found.values())) if found == planned else 0
    tally("P3", f"samples in their planned place over {KILLS} kills", held=held, of=samples)
    epochs = Counter(uid for seen in found.values() for uid in seen)
    assert len(set(epochs.values())) == 1  # every sample as often as every other


def test_p4_ranks_and_workers_may_change(inputs, tmp_path, tally):
    # As in tests/training/saving/test_kills.py: no batch norm within micro-batches, and a low rate.
    changes = {"loss": LossConfig(), "optimizer": OptimizerConfig(learning_rate=1e-5)}
    whole = replace(tiny_config(inputs, tmp_path / "whole", steps=16), **changes)
    fit(whole, uids=tmp_path / "whole.uids")
    elastic = replace(whole, run_folder=tmp_path / "elastic")
    for ranks, workers, kill_at in ((1, 0, 4), (2, 3, 8), (4, 1, 12), (1, 0, None)):
        own = replace(elastic, data=replace(elastic.data, workers=workers))
        fit(own, ranks=ranks, kill_at=kill_at, uids=tmp_path / "elastic.uids")
    expected, found = (trained_on(tmp_path / f"{name}.uids") for name in ("whole", "elastic"))
    same = sum(found[step] == seen for step, seen in expected.items())
    tally("P4", "batches that are the same on 1, 2, 4 and 1 ranks", held=same, of=len(expected))
    losses = [
        [record["loss"] for record in left_by(config)["records"] if "loss" in record]
        for config in (whole, elastic)
    ]
    near = sum(abs(one - other) <= 1e-5 * one for one, other in zip(*losses, strict=True))
    tally("P4", "losses of them within 1e-5", held=near, of=len(losses[0]))
