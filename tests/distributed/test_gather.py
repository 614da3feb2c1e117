import pytest
import torch

from tests.support.processes import run_in_world
from vlm.distributed.gather import gather_numbers, gather_rows, send_rows, sum_over
from vlm.distributed.groups import SINGLE, join_group, world_group

FLOATS = dict.fromkeys(("dtype", "wire_dtype", "gradient_wire_dtype"), torch.float32)


def test_a_group_of_one_keeps_its_own_rows_but_rounds_them():
    rows = torch.randn(3, 2)
    assert gather_rows(rows, SINGLE, [3]) is rows
    assert sum_over(rows, SINGLE) is rows
    assert gather_numbers([1, 2], SINGLE, torch.device("cpu")) == [[1, 2]]
    rounded = send_rows(rows, SINGLE, [3], **FLOATS | {"wire_dtype": torch.bfloat16}).receive()
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, rows.bfloat16().float())
    assert not torch.equal(rounded, rows)


def own_rows(rank, sizes):
    return torch.arange(2.0 * sizes[rank]).reshape(sizes[rank], 2) + 10 * rank


def _gathered_and_gradient(rank, group_size, sizes, overlap):
    group = join_group([list(range(k, k + group_size)) for k in range(0, 4, group_size)])
    first = rank - rank % group_size
    sizes_of_group = sizes[first : first + group_size]
    rows = own_rows(rank, sizes).requires_grad_()
    gathered = send_rows(rows, group, sizes_of_group, overlap=overlap, **FLOATS).receive()
    # Each rank weighs the gathered rows differently; the gradient is the sum of the weights.
    ((rank + 1) * gathered * torch.arange(1, len(gathered) + 1)[:, None]).sum().backward()
    return [gathered.detach(), rows.grad]


@pytest.mark.distributed
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("group_size", [2, 4])
@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (1, 3, 0, 2), (2, 1, 0, 0)])
def test_rows_come_in_rank_order_and_gradients_are_summed_over_the_group(
    group_size, sizes, overlap
):
    results = run_in_world(_gathered_and_gradient, 4, group_size, sizes, overlap)
    for rank, (gathered, gradient) in enumerate(results):
        first = rank - rank % group_size
        members = range(first, first + group_size)
        expected = torch.cat([own_rows(member, sizes) for member in members])
        torch.testing.assert_close(gathered, expected)
        before = sum(sizes[first:rank])
        weight = sum(member + 1 for member in members)
        places = torch.arange(before + 1.0, before + sizes[rank] + 1)
        torch.testing.assert_close(gradient, weight * places[:, None].expand(-1, 2))


def _rounded(rank):
    rows = torch.tensor([[1.0 + 2**-9 * (rank + 1)]], requires_grad=True)
    sent = send_rows(
        rows, world_group(), [1, 1], dtype=torch.float32, wire_dtype=torch.bfloat16,
        gradient_wire_dtype=torch.bfloat16,
    )  # fmt: skip
    gathered = sent.receive()
    (gathered * (1 + 2**-9)).sum().backward()
    return [gathered.detach(), rows.grad]


@pytest.mark.distributed
def test_features_and_gradients_are_rounded_to_what_they_travel_in():
    for gathered, gradient in run_in_world(_rounded, 2):
        # Of bfloat16's 8 bits none is left for 2**-9, and 1 + 2**-8 is half way and goes to even.
        assert gathered.flatten().tolist() == [1.0, 1.0]
        assert gradient.item() == 2.0


def _ids(rank):
    sizes = [1, 2]
    ids = torch.tensor([rank, 2**62 + rank])[: sizes[rank]]
    numbers = gather_numbers([rank, -(2**62)], world_group(), torch.device("cpu"))
    return [gather_rows(ids, world_group(), sizes), numbers]


@pytest.mark.distributed
def test_integers_are_gathered_exactly():
    for ids, numbers in run_in_world(_ids, 2):
        assert ids.tolist() == [0, 1, 2**62 + 1]
        assert numbers == [[0, -(2**62)], [1, -(2**62)]]


def _sum_and_gradient(rank):
    values = torch.tensor([1.0, 2.0]).mul(rank + 1).requires_grad_()
    total = sum_over(values, world_group())
    (total * (rank + 1)).sum().backward()
    return [total.detach(), values.grad]


@pytest.mark.distributed
def test_sums_and_their_gradients_add_up_over_the_ranks():
    for total, gradient in run_in_world(_sum_and_gradient, 3):
        torch.testing.assert_close(total, torch.tensor([6.0, 12.0]))
        torch.testing.assert_close(gradient, torch.tensor([6.0, 6.0]))
