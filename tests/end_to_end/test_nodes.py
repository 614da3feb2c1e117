"""Two nodes, each with a launcher of its own, that meet on this machine's loopback address."""

import os
import socket
import subprocess
import sys

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


def start_nodes(launcher, arguments):
    """Start a launcher for each of two nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", *LAUNCHERS[launcher](str(node), port), "-m", "vlm", *arguments],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip


def finish(nodes):
    """Wait for the nodes, and return what each printed."""
    try:
        printed = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(printed)[-3000:]
    return printed


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_nodes_report_the_losses_of_one_process(tmp_path, small_emoji, launcher):
    changes = CHANGES | {"data": small_emoji}
    run_vlm(*train_arguments(tmp_path / "one", steps=5, **changes))
    finish(start_nodes(launcher, train_arguments(tmp_path / "two", steps=5, **changes)))
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 5
    assert two == pytest.approx(one, rel=1e-4)
