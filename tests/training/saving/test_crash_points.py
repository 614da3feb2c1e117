"""Whatever call a process dies at, or a disk fails at, a whole checkpoint is there and is taken."""

import re

import pytest

from tests.support.disk_faults import (
    calls_of_a_save,
    damage_everywhere,
    die_at_every_call,
    fail_at_every_call,
    is_move,
    loaded_step,
    save_step,
)
from vlm.errors import CheckpointError

# A process with threads is forked, from 3.12 on with a warning; the fork only writes files.
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@FORKS
@pytest.mark.slow
def test_a_process_that_dies_while_it_saves_leaves_the_older_or_the_newer_checkpoint(tmp_path):
    assert die_at_every_call(tmp_path, "over a damaged one") > 30


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ENOSPC", "EIO"])
def test_a_disk_that_fails_while_it_saves_leaves_a_checkpoint_and_the_run(tmp_path, how):
    assert fail_at_every_call(tmp_path, "the second one", how) > 30


@pytest.mark.slow
def test_damage_anywhere_is_named_and_the_older_checkpoint_taken(tmp_path):
    assert damage_everywhere(tmp_path, 200) == 200


def test_everything_is_on_the_disk_before_the_move_and_the_move_before_the_purge(tmp_path):
    calls = calls_of_a_save(tmp_path, "the second one")
    moved = next(number for number, call in enumerate(calls) if is_move(call))
    before, after = calls[:moved], calls[moved + 1 :]
    for name in ("MANIFEST.json", "state.json", "model.safetensors", "optimizer.safetensors"):
        path = f"{tmp_path}/.step-00000002.partial/{name}"
        written = max(number for number, call in enumerate(before) if call == f"write {path}")
        opened = [number for number, call in enumerate(before) if call == f"open {path} 0"]
        assert max(opened) > written, name
        assert before[max(opened) + 1].startswith("fsync"), name
    assert before[-2].startswith(f"open {tmp_path}/.step-00000002.partial ")  # the names in it
    assert after[0].startswith(f"open {tmp_path} ")
    assert [call.split()[0] for call in (before[-1], after[1])] == ["fsync", "fsync"]
    assert re.match(r"rename \S+/step-00000001 ", after[2])


def test_where_every_checkpoint_is_damaged_nothing_is_loaded(tmp_path):
    for step in (1, 2):
        save_step(tmp_path, step, keep=2)
        (tmp_path / f"step-0000000{step}/state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"can be gone on from: .*00002/.*00001/state\.json"):
        loaded_step(tmp_path)
