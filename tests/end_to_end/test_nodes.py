"""Two nodes, each with a launcher of its own, that meet on this machine's loopback address."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.end_to_end.test_training import losses, train_arguments
from tests.support.commands import ROOT, run_vlm

LAUNCHERS = {
    "torchrun": lambda node, port: [
        "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", node,
        "--master_addr", "127.0.0.1", "--master_port", port,
    ],
    "accelerate": lambda node, port: [
        "accelerate.commands.launch", "--config_file", "configs/accelerate/2-cpus.yaml",
        "--num_machines", "2", "--num_processes", "2", "--machine_rank", node,
        "--main_process_ip", "127.0.0.1", "--main_process_port", port,
    ],
}  # fmt: skip
CHANGES = {"optimizer.learning_rate": 1e-4, "data.streams": 1}


def start_nodes(launcher, arguments, run_folder):
    """Start a launcher for each of two nodes, in a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    before = [ROOT / "configs/clusters/launch.sh", run_folder, sys.executable, "-m"]
    return [
        subprocess.Popen(
            [*before, *LAUNCHERS[launcher](str(node), port), "-m", "vlm", *arguments],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip


def finish(nodes, code=0):
    """Wait for the nodes to end with a code."""
    try:
        printed = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                for process in psutil.Process(node.pid).children(recursive=True):
                    process.kill()
                node.communicate()
    assert [node.returncode for node in nodes] == [code, code], "\n".join(printed)[-3000:]


def wait_for_steps(run_folder, number, nodes):
    """Wait until a run has reported `number` steps."""
    path, deadline = run_folder / "metrics.jsonl", time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < number:
        assert time.monotonic() < deadline
        assert [node.poll() for node in nodes] == [None, None]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_nodes_report_the_losses_of_one_process(tmp_path, small_emoji):
    changes = CHANGES | {"data": small_emoji}
    run_vlm(*train_arguments(tmp_path / "one", steps=5, **changes))
    arguments = train_arguments(tmp_path / "two", steps=5, **changes)
    finish(start_nodes("torchrun", arguments, tmp_path / "two"))
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 5
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_to_one_node_ends_all_with_a_checkpoint_and_a_relaunch_goes_on(
    tmp_path, small_emoji
):
    run_folder = tmp_path / "run"
    arguments = train_arguments(run_folder, steps=200, **CHANGES, data=small_emoji)
    nodes = start_nodes("accelerate", [*arguments, "--resume"], run_folder)
    wait_for_steps(run_folder, 2, nodes)
    for process in psutil.Process(nodes[0].pid).children(recursive=True):
        process.send_signal(signal.SIGUSR1)  # as Slurm does: to the launcher and its rank
    finish(nodes, code=75)
    (newest,) = (run_folder / "checkpoints").iterdir()
    step = int(newest.name.removeprefix("step-"))
    assert 2 <= step < 200
    again = [str(step + 3) if word == "200" else word for word in arguments]
    finish(start_nodes("torchrun", [*again, "--resume"], run_folder))
    assert (run_folder / "bundle/vlm.json").exists()
    records = (run_folder / "metrics.jsonl").read_text().splitlines()
    reported = [record["step"] for record in map(json.loads, records) if "loss" in record]
    assert reported == list(range(1, step + 4))
