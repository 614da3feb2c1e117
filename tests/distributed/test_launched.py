"""A process finds the ranks that it was launched with, and leaves them in order."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests.support.commands import ROOT
from vlm.distributed.groups import SINGLE, launched_group
from vlm.errors import DistributedError

RANK = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from vlm.distributed.gather import gather_numbers
from vlm.distributed.groups import launched_group

def run(folder, ending):
    try:
        with launched_group("cpu") as group:
            [[first], [second]] = gather_numbers([group.rank + 5], group, torch.device("cpu"))
            if ending == "error":
                raise LookupError
    except LookupError:
        pass
    found = f"{group.rank} of {group.size}: {first} {second}, {dist.is_initialized()}"
    (folder / f"{group.rank}.txt").write_text(found)

# A global would keep gloo's threads beyond the end of the interpreter, which aborts then.
run(Path(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ending", ["well", "error"])
def test_launched_ranks_find_each_other_and_part(tmp_path, ending):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--standalone", script, tmp_path, ending,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )  # fmt: skip
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == f"{rank} of 2: 5 6, False"


def test_a_process_without_a_launcher_is_alone():
    with launched_group("cuda:3") as group:
        assert group is SINGLE
        assert not dist.is_initialized()


def test_one_device_for_several_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(DistributedError, match="the device is cuda:0 and there are 2 ranks"),
        launched_group("cuda:0"),
    ):
        pass
