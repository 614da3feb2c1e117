"""Traces of steps, the record of a start, and deterministic operations."""

import gzip
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support.commands import run_vlm
from tests.support.tiny_run import config, losses
from vlm.errors import ConfigError
from vlm.training.build import build_run
from vlm.training.config import EvaluationConfig, ProfileConfig, config_as_yaml
from vlm.training.monitoring import environment
from vlm.training.monitoring.environment import ENVIRONMENT_NAME

QUIET = {"evaluation": EvaluationConfig(), "report_every": 1}


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "traced"), [("2:3", 2), ("6:20", 2)])
def test_the_steps_that_are_named_are_traced_and_nothing_changes(inputs, tmp_path, steps, traced):
    build_run(config(inputs, tmp_path / "plain", **QUIET)).fit()
    build_run(config(inputs, tmp_path, profile=ProfileConfig(steps=steps), **QUIET)).fit()
    assert losses(tmp_path) == losses(tmp_path / "plain")
    written = {path.name for path in tmp_path.glob("profile/*")}
    name = f"steps-{steps.replace(':', '-')}-rank-0.trace.json.gz"
    assert written == {name}
    with gzip.open(tmp_path / "profile" / name) as file:
        events = json.load(file)["traceEvents"]
    updates = [e for e in events if e.get("name", "").startswith("Optimizer.step#AdamW")]
    assert len(updates) == traced


@pytest.mark.slow
def test_a_command_names_the_steps_as_first_colon_last_and_so_does_the_config_it_leaves(
    inputs, tmp_path
):
    file = tmp_path / "run.yaml"
    file.write_text(config_as_yaml(config(inputs, tmp_path / "a", **QUIET)))
    run_vlm("train", "--config", file, "--profile.steps=2:3")
    run_vlm("train", "--config", tmp_path / "a/config.yaml", "--run_folder", tmp_path / "b")
    for name in ("a", "b"):
        assert (tmp_path / name / "profile/steps-2-3-rank-0.trace.json.gz").is_file()


def test_other_ranks_are_traced_only_if_named(inputs, tmp_path):
    profile = ProfileConfig(steps="1:1", ranks=(1,))
    build_run(config(inputs, tmp_path, profile=profile, **QUIET)).fit()
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("steps", ["0:1", "3:2", "3", "1:2:3", "a:b", ":", "", "-1:2", "[10, 12]"])
def test_steps_that_cannot_be_traced_are_refused(steps):
    with pytest.raises(ConfigError, match=r"expected FIRST:LAST, a first step of at least 1"):
        ProfileConfig(steps=steps)


def test_steps_after_the_last_one_are_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"profile.steps is 8:9 in a run of 7 steps; expected a"):
        config(inputs, tmp_path, profile=ProfileConfig(steps="8:9"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("report_every", {"report_every": -1}),
        ("evaluation.every_steps", {"evaluation": EvaluationConfig(every_steps=-1)}),
    ],
)
def test_intervals_below_0_are_refused(inputs, tmp_path, name, changes):
    with pytest.raises(ConfigError, match=f"{name} is -1; expected at least 0, which is never"):
        config(inputs, tmp_path, **changes)


def test_each_start_is_recorded_with_what_it_ran_on(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vlm", "train", "--seed", "0"])
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    build_run(config(inputs, tmp_path, **QUIET)).fit()
    build_run(config(inputs, tmp_path, **QUIET), resume="auto").fit()
    text = (tmp_path / ENVIRONMENT_NAME).read_text(encoding="utf-8")
    first, second = json.loads(text)
    assert (first["step"], second["step"], first["processes"]) == (0, 7, 1)
    assert first["command"].endswith("vlm train --seed 0")
    assert first["packages"]["torch"]
    assert first["variables"]["NCCL_DEBUG"] == "WARN"
    assert "secret" not in text


def test_the_commit_is_that_of_the_package_with_a_mark_where_files_differ(tmp_path, monkeypatch):
    package = tmp_path / "vlm"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(environment, "__file__", str(package / "training" / "environment.py"))

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert environment.environment()["commit"] is None
    git("init")
    assert environment.environment()["commit"] is None  # another project's checkout is around it
    git("add", ".")
    git("commit", "-m", "a")
    assert environment.environment()["commit"] == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("1")
    assert environment.environment()["commit"] == git("rev-parse", "HEAD") + "+"


@pytest.fixture
def torch_settings(monkeypatch):
    """Put back what is of the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("torch_settings")
def test_two_deterministic_runs_have_equal_bytes(inputs, tmp_path):
    for name in ("a", "b"):
        build_run(config(inputs, tmp_path / name, deterministic=True, **QUIET)).fit()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    kept = [tmp_path / name / "checkpoints" / "step-00000007" for name in ("a", "b")]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (kept[0] / file).read_bytes() == (kept[1] / file).read_bytes()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
