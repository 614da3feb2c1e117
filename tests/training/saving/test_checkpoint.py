"""What a checkpoint promises: whole or absent, every damage seen, never the last one gone first."""

import errno
import hashlib
import json
import re
import resource
import shutil
import signal
import threading

import pytest
import torch
from torch import nn

import vlm
from vlm.errors import CheckpointError, ConfigError
from vlm.training.config import CheckpointConfig, OptimizerConfig
from vlm.training.optimization.optimizer import build_optimizer
from vlm.training.progress import Progress
from vlm.training.saving.checkpoint import Checkpoints
from vlm.training.saving.state import OptimizerState
from vlm.training.saving.tensor_files import TensorSnapshot


def build(name="adamw"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model = model.to(memory_format=torch.channels_last)  # as the image tower lies in memory
    return model, build_optimizer(model, OptimizerConfig(name=name, learning_rate=0.01))


def parts(model, optimizer, progress):
    return {"model": model, "optimizer": OptimizerState(model, optimizer), "progress": progress}


def save(folder, model, optimizer, *, step, required=False, **settings):
    checkpoints = Checkpoints(folder, **{"keep": 2} | settings)
    checkpoints.save(step, parts(model, optimizer, Progress(step, 8 * step)), required=required)


def load(folder, model, optimizer, resume="auto"):
    progress, checkpoints = Progress(), Checkpoints(folder, keep=2)
    if (found := checkpoints.find(resume)) is None:
        return None
    checkpoints.load(found, parts(model, optimizer, progress))
    return progress


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path, how="flip"):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(8, 3, 4, 4, generator=generator)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_going_on_from_a_checkpoint_is_bitwise_the_same_as_not_stopping(tmp_path, name):
    model, optimizer = build(name)
    train(model, optimizer, range(3))
    save(tmp_path, model, optimizer, step=3)
    train(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = build(name)
    progress = load(tmp_path, resumed, resumed_optimizer)
    assert progress == Progress(3, 24)
    train(resumed, resumed_optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    model, optimizer = build()
    for step in (9, 10, 100_000_000):
        save(tmp_path, model, optimizer, step=step)
    assert names(tmp_path) == ["step-00000010", "step-100000000"]
    assert load(tmp_path, model, optimizer) == Progress(100_000_000, 800_000_000)


def test_some_are_kept_for_good(tmp_path):
    for step in range(1, 8):
        save(tmp_path, *build(), step=step, keep_every=3)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (3, 6, 7)]


@pytest.mark.parametrize("keep_every", [-5, 3, 7])
def test_those_for_good_are_among_those_that_are_written(keep_every):
    with pytest.raises(ConfigError, match="expected a multiple, or 0"):
        CheckpointConfig(every_steps=5, keep_every=keep_every)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert load(tmp_path / "none", *build()) is None
    assert load(tmp_path, *build()) is None


def test_what_a_killed_run_left_half_written_is_ignored_and_removed(tmp_path):
    model, optimizer = build()
    save(tmp_path, model, optimizer, step=1)
    for name in (".step-00000002.partial", ".step-00000001.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert load(tmp_path, model, optimizer) == Progress(1, 8)
    save(tmp_path, model, optimizer, step=3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_named_and_never_loaded(tmp_path, name, how):
    model, optimizer = build()
    train(model, optimizer, range(1))
    save(tmp_path, model, optimizer, step=1)
    assert names(tmp_path / "step-00000001") == FILES
    damage(tmp_path / "step-00000001" / name, how)
    model, optimizer = build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for resume in ("auto", tmp_path / "step-00000001"):
        with pytest.raises(CheckpointError, match=rf"step-00000001/{name} is damaged: "):
            load(tmp_path, model, optimizer, resume)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it_and_stays_for_a_look(tmp_path, capsys):
    model, optimizer = build()
    for step in (1, 2):
        save(tmp_path, model, optimizer, step=step)
        train(model, optimizer, range(2))
    damage(tmp_path / "step-00000002" / "model.safetensors")
    for _ in range(2):
        assert load(tmp_path, *build()) == Progress(1, 8)
        warning = capsys.readouterr().err
        assert re.search(r"warning: \S*step-00000002/model.safetensors is damaged: sha256", warning)
        assert f"; going on from {tmp_path / 'step-00000001'} instead" in warning
    save(tmp_path, model, optimizer, step=2)
    assert names(tmp_path) == ["aside-1-step-00000002", "step-00000001", "step-00000002"]
    assert load(tmp_path, *build()) == Progress(2, 16)
    assert capsys.readouterr().err == ""


def test_later_checkpoints_of_a_run_that_went_on_from_an_older_one_are_put_aside(tmp_path):
    model, optimizer = build()
    for step in (1, 2, 3):
        save(tmp_path, model, optimizer, step=step, keep=3)
    assert load(tmp_path, model, optimizer, tmp_path / "step-00000001") == Progress(1, 8)
    save(tmp_path, model, optimizer, step=2, keep=3)
    assert names(tmp_path) == [
        "aside-1-step-00000002", "aside-1-step-00000003", "step-00000001", "step-00000002",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["step-1", "."])
def test_a_folder_that_is_no_checkpoint_is_refused_with_what_one_is(tmp_path, name):
    save(tmp_path, *build(), step=3)
    with pytest.raises(CheckpointError, match=r"is no checkpoint; expected a run's checkpoin"):
        load(tmp_path, *build(), resume=tmp_path / name)


def test_a_disk_that_refuses_is_said_and_the_run_goes_on_with_what_is_there(tmp_path, capsys):
    model, optimizer = build()
    save(tmp_path, model, optimizer, step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        save(tmp_path, model, optimizer, step=2)
        with pytest.raises(CheckpointError, match=r"no space left .*; the newest one is .*00001$"):
            save(tmp_path, model, optimizer, step=2, required=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert re.search(
        r"warning: no space left to write \S*step-00000002: .*the run goes on and the newest one "
        r"is \S*step-00000001\n",
        capsys.readouterr().err,
    )
    assert names(tmp_path) == ["step-00000001"]
    save(tmp_path, model, optimizer, step=2)
    assert load(tmp_path, model, optimizer) == Progress(2, 16)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_kept(tmp_path, wrong):
    model, optimizer = build()
    save(tmp_path, model, optimizer, step=1)
    with torch.no_grad():
        model[3].bias[1] = wrong
    with pytest.raises(CheckpointError, match=r"the model .* not finite, first in 3\.bias"):
        save(tmp_path, model, optimizer, step=2)
    assert names(tmp_path) == ["step-00000001"]


def test_an_older_checkpoint_that_cannot_be_removed_is_said(tmp_path, capsys, monkeypatch):
    save(tmp_path, *build(), step=1)
    save(tmp_path, *build(), step=2)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(tmp_path, *build(), step=3)
    assert "warning: cannot remove" in capsys.readouterr().err
    assert load(tmp_path, *build()) == Progress(3, 24)


def test_the_same_step_is_not_written_twice(tmp_path):
    model, checkpoints = nn.Linear(2, 2), Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, {"model": model})
    before = (tmp_path / "step-00000001").stat().st_mtime_ns
    checkpoints.save(1, {"model": model})
    assert (tmp_path / "step-00000001").stat().st_mtime_ns == before
    assert names(tmp_path) == ["step-00000001"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, *build(), step=1)
    model = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        load(tmp_path, model, torch.optim.AdamW(model.parameters()))


def locked(count):
    """The model whose first parameters are locked, as a run with a locked tower builds it."""
    model, _ = build()
    for parameter in list(model.parameters())[:count]:
        parameter.requires_grad_(False)
    return model, build_optimizer(model, OptimizerConfig(learning_rate=0.01))


def test_what_was_trained_and_is_locked_now_belongs_to_another_configuration(tmp_path):
    model, optimizer = build()
    train(model, optimizer, range(2))
    save(tmp_path, model, optimizer, step=2)
    with pytest.raises(CheckpointError, match=r"optimizer state for 0\.weight, which is frozen"):
        load(tmp_path, *locked(1))


def test_what_was_locked_and_is_trained_now_starts_without_moments(tmp_path):
    model, optimizer = locked(2)
    train(model, optimizer, range(2))
    save(tmp_path, model, optimizer, step=2)
    resumed, resumed_optimizer = build()
    load(tmp_path, resumed, resumed_optimizer)
    pairs = dict(zip(model.named_parameters(), resumed.parameters(), strict=True))
    for (name, before), after in pairs.items():
        found, expected = resumed_optimizer.state.get(after), optimizer.state.get(before)
        assert (found is None) == (expected is None) == name.startswith("0."), name
        if found is not None:
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_in_the_background_the_state_of_the_step_is_kept_while_training_goes_on(
    tmp_path, monkeypatch
):
    model, optimizer = build()
    train(model, optimizer, range(2))
    save(tmp_path / "waited", model, optimizer, step=2)
    free, write = threading.Event(), TensorSnapshot.write

    def write_late(*arguments):
        assert free.wait(60)
        return write(*arguments)

    monkeypatch.setattr(TensorSnapshot, "write", write_late)
    progress = Progress(2, 16)
    checkpoints = Checkpoints(tmp_path / "apart", keep=2, in_background=True)
    checkpoints.save(2, parts(model, optimizer, progress))
    train(model, optimizer, range(2, 4))
    progress.step, progress.samples = 4, 32
    assert checkpoints.latest() is None
    free.set()
    checkpoints.finish()
    for name in FILES[1:]:
        waited, apart = (
            tmp_path / folder / "step-00000002" / name for folder in ("waited", "apart")
        )
        assert waited.read_bytes() == apart.read_bytes(), name


def test_the_last_checkpoint_is_waited_for_and_comes_after_the_one_in_the_background(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5, in_background=True)
    model, optimizer = build()
    for step in (1, 2, 3):
        checkpoints.save(step, parts(model, optimizer, Progress(step, 0)), required=step == 3)
    assert names(tmp_path) == [f"step-0000000{step}" for step in (1, 2, 3)]


def test_what_fails_in_the_background_is_said_and_a_fault_of_ours_is_raised(
    tmp_path, capsys, monkeypatch
):
    checkpoints = Checkpoints(tmp_path, keep=5, in_background=True)

    def fail(error):
        def write(*_):
            raise error

        monkeypatch.setattr(TensorSnapshot, "write", write)
        checkpoints.save(1, {"model": nn.Linear(2, 2)})

    fail(OSError(errno.EIO, "Input/output error"))
    checkpoints.finish()
    assert "warning: cannot read or write a checkpoint: [Errno 5]" in capsys.readouterr().err
    fail(AssertionError("a fault"))
    with pytest.raises(AssertionError, match="a fault"):
        checkpoints.save(2, {"model": nn.Linear(2, 2)})


def test_a_manifest_says_what_a_checkpoint_holds_and_who_wrote_it(tmp_path):
    model, optimizer = build()
    train(model, optimizer, range(1))
    save(tmp_path, model, optimizer, step=1)
    folder = tmp_path / "step-00000001"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert (manifest["step"], manifest["samples"], manifest["world_size"]) == (1, 8, 1)
    assert manifest["versions"] == {"vlm": vlm.__version__, "torch": torch.__version__}
    assert sorted(manifest["files"]) == FILES[1:]
    for name, known in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert known == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_part_may_join_and_another_leave_and_both_are_said(tmp_path, capsys):
    model, average = nn.Linear(2, 2), nn.Linear(2, 2)
    Checkpoints(tmp_path, keep=1).save(1, {"model": model, "average": average})
    other, progress, checkpoints = nn.Linear(2, 2), Progress(5, 5), Checkpoints(tmp_path, keep=1)
    checkpoints.load(checkpoints.find("auto"), {"average": other, "progress": progress})
    assert torch.equal(other.weight, average.weight)
    assert progress == Progress(5, 5)
    assert capsys.readouterr().err.splitlines() == [
        "progress starts anew: the checkpoint has none", "model is left out: the run has none",
    ]  # fmt: skip


def test_a_part_may_have_tensors_and_numbers(tmp_path):
    class Guard:
        def __init__(self, **state):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    Checkpoints(tmp_path, keep=1).save(
        1, {"guard": Guard(norms=torch.arange(3.0), count=2, seen=[])}
    )
    found, checkpoints = Guard(), Checkpoints(tmp_path, keep=1)
    checkpoints.load(checkpoints.find("auto"), {"guard": found})
    assert found.state.pop("norms").tolist() == [0, 1, 2]
    assert found.state == {"count": 2, "seen": []}
