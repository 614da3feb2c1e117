import copy

import pytest
import timm
import torch

from tests.support.processes import run_in_processes
from vlm.distributed.groups import SINGLE, world_group
from vlm.models.batch_norm import synchronize_batch_norm

LOCAL, STEPS = 4, 3


def tower():
    """An image tower with plain and activation-fusing batch norms, in float64."""
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).double().train()


def images(step, count):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)


def train(model, rows, average):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        output = model(images(step, 2 * LOCAL)[rows])
        (output.square() * torch.arange(1, 6)).mean().backward()
        average(model)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def train_on_this_rank(rank):
    group = world_group()
    model = synchronize_batch_norm(tower(), group, torch.device("cpu"))

    def average(model):
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= group.size

    return train(model, slice(rank * LOCAL, (rank + 1) * LOCAL), average)


@pytest.mark.distributed
def test_two_processes_normalise_and_train_like_one_on_the_whole_batch():
    expected = train(tower(), slice(None), lambda model: None)
    for state in run_in_processes(train_on_this_rank, 2):
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-10)


def evaluate_on_this_rank(rank):
    model = tower()
    model(images(0, 8))  # gives the running statistics other values than 0 and 1
    plain = copy.deepcopy(model).eval()
    synchronized = synchronize_batch_norm(model, world_group(), torch.device("cpu")).eval()
    batch = images(rank, 3)
    return [synchronized(batch).detach(), plain(batch).detach()]


@pytest.mark.distributed
def test_evaluation_uses_the_running_statistics_without_the_other_ranks():
    for found, expected in run_in_processes(evaluate_on_this_rank, 2):
        torch.testing.assert_close(found, expected)


def test_one_process_keeps_torchs_own_batch_norm():
    model = tower()
    modules = [type(module) for module in model.modules()]
    assert synchronize_batch_norm(model, SINGLE, torch.device("cpu")) is model
    assert [type(module) for module in model.modules()] == modules
