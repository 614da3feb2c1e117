import pytest
import torch

from tests.support.processes import run_in_processes
from vlm.distributed.gather import gather_rows, sum_over
from vlm.distributed.groups import SINGLE, split_into_groups


def test_a_group_of_one_returns_its_own_rows():
    rows = torch.randn(3, 2)
    assert gather_rows(rows, SINGLE) is rows
    assert sum_over(rows, SINGLE) is rows


def _gathered_and_gradient(rank, group_size):
    group = split_into_groups(group_size)
    rows = (torch.arange(4.0).reshape(2, 2) + 10 * rank).requires_grad_()
    gathered = gather_rows(rows, group)
    # Each rank weighs the gathered rows differently; the gradient is the sum of the weights.
    ((rank + 1) * gathered * torch.arange(1, len(gathered) + 1)[:, None]).sum().backward()
    return [gathered.detach(), rows.grad]


@pytest.mark.distributed
@pytest.mark.parametrize("group_size", [2, 4])
def test_rows_come_in_rank_order_and_gradients_are_summed_over_the_group(group_size):
    results = run_in_processes(_gathered_and_gradient, 4, group_size)
    own = [torch.arange(4.0).reshape(2, 2) + 10 * rank for rank in range(4)]
    for rank, (gathered, gradient) in enumerate(results):
        first = rank - rank % group_size
        members = range(first, first + group_size)
        torch.testing.assert_close(gathered, torch.cat([own[m] for m in members]))
        place = 2 * (rank - first)
        weight = sum(member + 1 for member in members)
        expected = weight * torch.tensor([[place + 1.0] * 2, [place + 2.0] * 2])
        torch.testing.assert_close(gradient, expected)


def _gathered_ids(rank):
    return gather_rows(torch.tensor([rank, 2**62 + rank]), split_into_groups())


@pytest.mark.distributed
def test_integers_are_gathered_exactly():
    expected = torch.tensor([0, 2**62, 1, 2**62 + 1])
    for gathered in run_in_processes(_gathered_ids, 2):
        assert torch.equal(gathered, expected)


def _sum_and_gradient(rank):
    values = torch.tensor([1.0, 2.0]).mul(rank + 1).requires_grad_()
    total = sum_over(values, split_into_groups())
    (total * (rank + 1)).sum().backward()
    return [total.detach(), values.grad]


@pytest.mark.distributed
def test_sums_and_their_gradients_add_up_over_the_ranks():
    for total, gradient in run_in_processes(_sum_and_gradient, 3):
        torch.testing.assert_close(total, torch.tensor([6.0, 12.0]))
        torch.testing.assert_close(gradient, torch.tensor([6.0, 6.0]))
