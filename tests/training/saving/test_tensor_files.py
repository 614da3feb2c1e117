"""Tensors that are divided among ranks are kept in shards, and read in any other layout."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.support.processes import run_in_world
from vlm.distributed.groups import host_group
from vlm.errors import CheckpointError
from vlm.training.saving.checkpoint import Checkpoints
from vlm.training.saving.state import OptimizerState

SHAPES = {"wide": (7, 5), "long": (9,), "short": (2, 3), "kernel": (3, 2, 2, 2), "scalar": ()}
"""Dimensions that do not divide by ranks, and one with fewer rows than ranks."""


def whole(name, dtype=torch.float32):
    numbers = torch.arange(torch.Size(SHAPES[name]).numel(), dtype=torch.float64)
    return (numbers / 7 + len(name)).reshape(SHAPES[name]).to(dtype)


class Part:
    """Named tensors, in some layout."""

    def __init__(self, layout, mesh):
        self.tensors = {name: divided(whole(name), layout, mesh) for name in SHAPES}
        self.tensors["half"] = divided(whole("wide", torch.bfloat16), layout, mesh)

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, state):
        self.tensors = state

    def forget(self):
        """Keep the layout, and none of the numbers."""
        for tensor in self.tensors.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()


def divided(tensor, layout, mesh):
    """Divide a tensor as a layout says; a scalar is whole on each rank."""
    if layout == "whole":
        return tensor.clone()
    if not tensor.ndim:
        return distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim)
    return distribute_tensor(tensor, mesh, LAYOUTS[layout])


LAYOUTS = {"sharded": [Shard(0)], "hybrid": [Replicate(), Shard(0)], "columns": [Shard(-1)]}


def mesh_of(layout):
    ranks = dist.get_world_size()
    if layout == "whole":
        return None
    if layout == "hybrid":
        return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (ranks,))


def checkpoints(folder, **settings):
    return Checkpoints(Path(folder), keep=2, group=host_group(timedelta(minutes=1)), **settings)


def save(rank, folder, layout):
    checkpoints(folder).save(3, {"part": Part(layout, mesh_of(layout))})


def load(rank, folder, layout):
    """Load in a layout; return all tensors whole."""
    part = Part(layout, mesh_of(layout))
    part.forget()
    own = checkpoints(folder)
    own.load(own.find("auto"), {"part": part})
    found = {}
    for name, tensor in part.tensors.items():
        assert isinstance(tensor, DTensor) == (layout != "whole"), name
        found[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("writers", "written"), [(4, "sharded"), (4, "hybrid"), (2, "columns"), (2, "whole")]
)
def test_any_layout_reads_any_other_bit_for_bit(tmp_path, writers, written):
    run_in_world(save, writers, tmp_path, written)
    files = {path.name for path in (tmp_path / "step-00000003").iterdir()}
    ranks = {"sharded": 4, "hybrid": 2, "columns": 2, "whole": 0}[written]  # replicas write once
    assert len([name for name in files if ".rank-" in name]) == ranks
    expected = {name: whole(name) for name in SHAPES} | {"half": whole("wide", torch.bfloat16)}
    for readers, layout in [
        (2, "sharded"),
        (4, "sharded"),
        (4, "hybrid"),
        (2, "columns"),
        (2, "whole"),
    ]:
        for found in run_in_world(load, readers, tmp_path, layout):
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), (readers, layout, name)
    one = Part("whole", None)
    one.forget()
    alone = Checkpoints(tmp_path, keep=2)
    alone.load(alone.find("auto"), {"part": one})
    for name, tensor in expected.items():
        assert torch.equal(one.tensors[name], tensor), name


def build(mesh):
    """A model and its optimizer, divided over a mesh."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    if mesh is not None:
        for layer in model:
            for name, parameter in list(layer.named_parameters()):
                sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                setattr(layer, name, nn.Parameter(sharded))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def update(model, optimizer, step):
    for number, parameter in enumerate(model.parameters()):
        gradient = torch.sin(torch.arange(parameter.numel()) + number + step)
        gradient = gradient.reshape(parameter.shape)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()


def weights(model) -> dict[str, Tensor]:
    return {
        name: each.full_tensor() if isinstance(each, DTensor) else each.detach().clone()
        for name, each in model.state_dict().items()
    }


def train(rank, folder, sharded, first, last, in_background=False):
    """Take steps from where the folder's newest checkpoint ends, and save; return the weights."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    model, optimizer = build(mesh)
    parts, own = (
        {"model": model, "optimizer": OptimizerState(model, optimizer)},
        checkpoints(folder),
    )
    if found := own.find("auto"):
        assert found.step == first
        own.load(found, parts)
    for step in range(first, last):
        update(model, optimizer, step)
    own.save(last, parts)
    kept = weights(model)
    if in_background:  # collectives of the next steps run at the same time
        for step in range(last, last + 5):
            update(model, optimizer, step)
            weights(model)
    own.finish()
    return kept


@pytest.mark.slow
@pytest.mark.distributed
def test_shards_are_written_in_the_background_as_they_were_at_the_step(tmp_path):
    for where in ("waited", "apart"):
        run_in_world(train, 2, tmp_path / where, True, 0, 2, where == "apart")
    files = sorted((tmp_path / "waited/step-00000002").glob("*.safetensors"))
    assert len(files) == 5  # of two ranks, and the step counts
    for file in files:
        assert file.read_bytes() == (tmp_path / "apart/step-00000002" / file.name).read_bytes()


@pytest.mark.slow
@pytest.mark.distributed
def test_weights_and_moments_go_on_over_any_number_of_ranks(tmp_path):
    model, optimizer = build(None)
    for step in range(8):
        update(model, optimizer, step)
    expected = weights(model)
    for first, ranks, sharded in [(0, 4, True), (2, 2, True), (4, 2, False), (6, 4, True)]:
        found = run_in_world(train, ranks, tmp_path, sharded, first, first + 2)
    for of_rank in found:
        for name, tensor in expected.items():
            # Vectors of numbers are rounded in one way, and what is left over in another.
            torch.testing.assert_close(of_rank[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def fail_on_one(rank, folder, required):
    """Let one rank fail to write; return what each rank says."""
    own = checkpoints(folder)
    own.save(1, {"part": Part("sharded", mesh_of("sharded"))})
    part = Part("sharded", mesh_of("sharded"))
    if rank == 1:
        own.folder = Path(folder) / "elsewhere"  # a disk that is not the one of the others
    try:
        own.save(2, {"part": part}, required=required)
    except CheckpointError as error:
        return str(error)
    return "went on"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("required", [True, False])
def test_what_one_rank_cannot_write_no_rank_takes_for_written(tmp_path, required):
    said = run_in_world(fail_on_one, 2, tmp_path, required)
    if required:
        assert said[0].startswith("rank 1: cannot ")
        assert all("rank 1: cannot " in each for each in said)
    else:
        assert said == ["went on", "went on"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
