"""P5 and P6 in full: every call of a save fails in every way, and files are damaged at random."""

import pytest

from tests.support.disk_faults import (
    CASES,
    damage_everywhere,
    die_at_every_call,
    fail_at_every_call,
)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_p5_a_process_may_die_at_every_call_of_a_save(tmp_path, tally):
    points = sum(die_at_every_call(tmp_path / case, case) for case in CASES)
    assert points >= 60
    tally("P5", "points of a save to die at, with a whole checkpoint left", held=points, of=points)


@pytest.mark.parametrize("how", ["ENOSPC", "EIO"])
def test_p5_a_disk_may_fail_at_every_call_of_a_save(tmp_path, tally, how):
    points = sum(fail_at_every_call(tmp_path / case, case, how) for case in CASES)
    assert points >= 60
    what = f"points of a save for {how}, with a whole checkpoint left and the run going on"
    tally("P5", what, held=points, of=points)


def test_p6_damage_is_seen(tmp_path, tally):
    held = damage_everywhere(tmp_path, 200, seed=6)
    tally("P6", "damaged files named, with the older checkpoint taken", held=held, of=200)
