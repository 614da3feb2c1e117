"""The scripts for clusters: sound shell, commands that their launcher reads, and signals."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from vlm.cli.parsing import parse
from vlm.cli.train import Options

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/clusters"
LAUNCH = FOLDER / "launch.sh"
SHELL = [LAUNCH, FOLDER / "slurm.sbatch"]
# What a scheduler, or the script itself, puts in the place of each.
VALUES = {
    "SLURM_NNODES": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "20001",
    "run_folder": "/runs/x", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
}  # fmt: skip


def documents(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def expanded(command, *words):
    """The words of a shell's command, which is printed instead of run."""
    script = command.replace("exec configs/clusters/launch.sh", "printf '%s\\0'").replace(
        "configs/clusters/launch.sh", "printf '%s\\0'"
    )
    found = subprocess.run(
        ["bash", "-c", script, "node", *words],
        env=os.environ | VALUES, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return found.split("\0")[:-1]


def slurm():
    text = (FOLDER / "slurm.sbatch").read_text()
    inner = text.split("bash -c '")[1].split("' node")[0]
    return expanded(inner, "--config", "configs/train/emoji.yaml")


def kubernetes():
    words = documents("kubernetes.yaml")[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    return [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in words[1:]]


def skypilot():
    return expanded(documents("skypilot.yaml")[0]["run"])


@pytest.mark.parametrize("words", [slurm, kubernetes, skypilot], ids=lambda each: each.__name__)
def test_commands_are_those_that_the_launcher_and_vlm_read(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, accelerate, launch, *rest = words()
    assert (accelerate, launch) == ("accelerate", "launch")
    found = launch_command_parser().parse_args(rest)
    assert (found.module, found.training_script, found.training_script_args[0]) == (
        True, "vlm", "train",
    )  # fmt: skip
    assert Path(found.config_file).is_file()
    assert (found.num_machines, found.machine_rank) == (2, 1)
    assert found.num_processes in (16, None)
    options = parse(Options, found.training_script_args[1:], prog="vlm train", description="")
    assert options.resume == "auto"


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_scripts_are_sound_shell(path):
    tool = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([tool, path], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert os.access(path, os.X_OK)


def test_the_pods_of_the_job_find_each_other_and_stay_long_enough():
    service, job = documents("kubernetes.yaml")
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    nodes = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == nodes
    (container,) = pod["containers"]
    words = container["command"]
    assert f"--num_machines={nodes}" in words
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--num_processes={nodes * gpus}" in words
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--main_process_ip={first}" in words
    assert pod["terminationGracePeriodSeconds"] > 600  # which launch.sh gives the ranks
    assert {each["name"] for each in container["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }


def test_slurm_signals_the_ranks_before_the_ranks_have_no_time_left():
    text = (FOLDER / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=USR1@600\n" in text  # no `B:`: the steps, not the batch script
    assert "#SBATCH --requeue\n" in text
    assert "srun --kill-on-bad-exit=1 --wait=660 " in text


@pytest.mark.parametrize(
    ("has_bundle", "code", "expected"), [(True, 0, 0), (False, 0, 75), (False, 2, 2)]
)
def test_a_scheduler_is_told_complete_from_interrupted_from_wrong(
    tmp_path, has_bundle, code, expected
):
    if has_bundle:
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "vlm.json").touch()
    words = [LAUNCH, tmp_path, "bash", "-c", f"exit {code}"]
    assert subprocess.run(words, check=False).returncode == expected


RANK = """
import os, signal, sys, time
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append("TERM"))
print(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"], signal.getsignal(signal.SIGUSR1), flush=True)
while not seen:
    time.sleep(0.02)
time.sleep(0.3)  # as a checkpoint is written
print(*seen, flush=True)
"""
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""


def test_ranks_get_sigterm_and_time_and_the_launcher_outlives_sigusr1(tmp_path):
    process = subprocess.Popen(
        [LAUNCH, tmp_path, sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == f"600 {signal.SIG_IGN!s}\n"
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert out == "TERM\n"  # once
    assert process.returncode == 75


def test_the_page_names_every_script_and_its_commands_are_read():
    page = (ROOT / "docs/clusters.md").read_text()
    assert [path.name for path in FOLDER.iterdir() if path.name not in page] == []
    blocks = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    commands = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    (by_accelerate,) = (words for words in commands if words[0] == "accelerate")
    found = launch_command_parser().parse_args(by_accelerate[2:])
    assert (found.num_machines, found.num_processes, found.module) == (2, 16, True)
    (by_torchrun,) = (words for words in commands if words[0] == "torchrun")
    found = get_args_parser().parse_args(by_torchrun[1:])
    assert (found.nnodes, found.nproc_per_node, found.module) == ("2", "8", True)
