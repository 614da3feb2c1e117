"""The order of an epoch is a permutation that follows from seed and epoch alone."""

import numpy as np
import pytest

from vlm.data.order import epoch_order

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014) on Python's own integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & WORD
    return value ^ value >> 31


def reference_order(size: int, seed: int, epoch: int) -> list[int]:
    stream = mix(mix(seed + GAMMA & WORD) + epoch * GAMMA & WORD)
    return sorted(range(size), key=lambda index: mix(index * GAMMA + stream & WORD))


@pytest.mark.parametrize("size", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize("epoch", [0, 1, 1000])
def test_an_epoch_reads_every_sample_once(size, epoch):
    order = epoch_order(size, seed=3, epoch=epoch)
    assert sorted(order.tolist()) == list(range(size))
    assert order.dtype == np.int64


@pytest.mark.parametrize(
    ("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (12345, 678), (2**63 - 1, 2**31), (2**64 - 1, 5)]
)
def test_the_order_equals_one_computed_with_whole_numbers(seed, epoch):
    order = epoch_order(50, seed=seed, epoch=epoch)
    assert order.tolist() == reference_order(50, seed, epoch)


def test_known_orders_stay_what_they_are():
    # Changing these breaks every run that is resumed with another version.
    assert epoch_order(10, seed=0, epoch=0).tolist() == [7, 0, 8, 2, 3, 1, 6, 9, 4, 5]
    assert epoch_order(10, seed=0, epoch=1).tolist() == [1, 8, 9, 3, 6, 5, 0, 7, 4, 2]
    assert epoch_order(10, seed=1, epoch=0).tolist() == [0, 6, 5, 8, 2, 1, 3, 7, 4, 9]


def test_the_order_is_a_pure_function():
    first = epoch_order(100, seed=5, epoch=2)
    np.random.seed(0)
    epoch_order(100, seed=6, epoch=3)
    assert epoch_order(100, seed=5, epoch=2).tolist() == first.tolist()


def test_seeds_and_epochs_give_different_orders():
    orders = {
        tuple(epoch_order(20, seed=seed, epoch=epoch).tolist())
        for seed in range(20)
        for epoch in range(20)
    }
    assert len(orders) == 400


def test_every_sample_comes_at_every_place_equally_often():
    size, epochs = 8, 800
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), epoch_order(size, seed=0, epoch=epoch)] += 1
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 25 < chi_square < 85  # (size - 1)**2 = 49 degrees of freedom, 0.1 % either side


def test_neighbours_of_one_epoch_are_no_neighbours_in_the_next():
    size = 2000
    first, second = (epoch_order(size, seed=0, epoch=epoch) for epoch in (0, 1))
    pairs = set(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))
    kept = pairs & set(zip(second[:-1].tolist(), second[1:].tolist(), strict=True))
    assert len(kept) < 8  # about one by chance
