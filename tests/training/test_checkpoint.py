import json

import pytest
import torch
from torch import nn

from vlm.errors import CheckpointError
from vlm.training.checkpoint import Checkpoints
from vlm.training.config import OptimizerConfig
from vlm.training.optimizer import build_optimizer
from vlm.training.state import OptimizerState, Progress


def build(name="adamw"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model = model.to(memory_format=torch.channels_last)  # as the image tower lies in memory
    return model, build_optimizer(model, OptimizerConfig(name=name, learning_rate=0.01))


def parts(model, optimizer, progress):
    return {"model": model, "optimizer": OptimizerState(model, optimizer), "progress": progress}


def save(folder, model, optimizer, *, step):
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save(step, parts(model, optimizer, Progress(step, 8 * step)))


def load(folder, model, optimizer):
    progress = Progress()
    found = Checkpoints(folder, keep=2).load_latest(parts(model, optimizer, progress))
    return progress if found else None


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
    for step in (9, 10, 100):
        save(tmp_path, model, optimizer, step=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert load(tmp_path, model, optimizer) == Progress(100, 800)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert load(tmp_path / "none", *build()) is None


def test_what_a_killed_run_left_half_written_is_ignored(tmp_path):
    model, optimizer = build()
    save(tmp_path, model, optimizer, step=1)
    partial = tmp_path / ".step-00000002.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert load(tmp_path, model, optimizer) == Progress(1, 8)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_never_loaded(tmp_path, name, damage):
    save(tmp_path, *build(), step=1)
    path = tmp_path / "step-00000001" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    model, optimizer = build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"step-00000001.* is damaged"):
        load(tmp_path, model, optimizer)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_a_state_that_is_no_json_is_damage(tmp_path):
    save(tmp_path, *build(), step=1)
    (tmp_path / "step-00000001" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path, *build())


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


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    save(tmp_path, *build(), step=1)
    names = sorted(path.name for path in (tmp_path / "step-00000001").iterdir())
    assert names == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert (
        json.loads((tmp_path / "step-00000001" / "state.json").read_text())["progress"]["samples"]
        == 8
    )


def test_other_ranks_take_part_and_write_nothing(tmp_path):
    asked = []

    class Shard:
        def state_dict(self):
            asked.append(True)
            return {"own": torch.zeros(1)}

        def load_state_dict(self, state):
            pass

    Checkpoints(tmp_path, keep=2, writes=False).save(1, {"shard": Shard()})
    assert asked
    assert not list(tmp_path.iterdir())


def test_a_further_part_joins_with_a_file_of_its_own(tmp_path):
    model, average = nn.Linear(2, 2), nn.Linear(2, 2)
    Checkpoints(tmp_path, keep=1).save(1, {"model": model, "average": average})
    names = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    assert names == {"model.safetensors", "average.safetensors", "state.json"}
    other = nn.Linear(2, 2)
    assert Checkpoints(tmp_path, keep=1).load_latest({"average": other})
    assert torch.equal(other.weight, average.weight)
