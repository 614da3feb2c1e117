"""The order of samples is a pure function of a plan and a few integers."""

import json
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from vlm.batches.mixture import BatchOrder, DataState, Mixture
from vlm.batches.order import SourceOrder, permutation
from vlm.errors import ConfigError
from vlm.text.caption_ids import text_id

WORD = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
ALONE = Mixture(phases=[(None, [1.0])])


def mix(value):
    """SplitMix64's finalizer (Steele, Lea and Flood 2014) on Python's own integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & WORD
    return value ^ value >> 31


def reference_permutation(size, *names):
    stream = 0
    for name in names:
        stream = mix(stream + name + GAMMA & WORD)
    low = (1 << max(size - 1, 1).bit_length()) - 1
    hashes = {index: mix(index * GAMMA + stream & WORD) & ~low for index in range(size)}
    return sorted(range(size), key=lambda index: (hashes[index], index))


def reference_stream(name, sizes, streams, stream, *, seed, block, epoch):
    """List (shard, row) of one stream's epoch, by walking over every sample."""
    shards = reference_permutation(len(sizes), seed, text_id(name), epoch)
    samples = [(shard, row) for shard in shards for row in range(sizes[shard])]
    total = len(samples)
    mine = samples[stream * total // streams : (stream + 1) * total // streams]
    blocks = [[]]
    for sample in mine:
        full = len(blocks[-1]) >= block and blocks[-1][-1][0] != sample[0]
        if full:
            blocks.append([])
        blocks[-1].append(sample)
    return [
        part[place]
        for number, part in enumerate(blocks)
        for place in reference_permutation(
            len(part), seed, text_id(name), epoch, stream, number
        )
    ]  # fmt: skip


def order_of(sizes, *, batch=6, streams=1, seed=0, block=50, rank=0, world_size=1):
    source = SourceOrder("data", np.array(sizes), streams, seed, block)
    return BatchOrder([source], ALONE, batch, seed=seed, rank=rank, world_size=world_size)


def mixture_of(weights, *, sizes=(40, 40, 40), batch=12, streams=2, **mixture):
    sources = [
        SourceOrder(f"source {number}", np.array(sizes), streams, 0, 50)
        for number in range(len(weights))
    ]
    plan = Mixture(**{"phases": [(None, weights)]} | mixture)
    return BatchOrder(sources, plan, batch)


@pytest.mark.parametrize("size", [1, 2, 7, 100, 5000])
@pytest.mark.parametrize("names", [(), (0,), (3, 1), (2**64 - 1, 2**63, 5)], ids=str)
def test_a_permutation_equals_one_computed_with_whole_numbers(size, names):
    found = permutation(size, *names)
    assert found.tolist() == reference_permutation(size, *names)
    assert sorted(found.tolist()) == list(range(size))


def test_known_permutations_stay_what_they_are():
    # Changing these breaks every run that is resumed with another version.
    assert permutation(10, 0, 0).tolist() == [1, 8, 9, 3, 6, 5, 0, 7, 4, 2]
    assert permutation(10, 0, 1).tolist() == [5, 2, 8, 6, 9, 1, 7, 4, 0, 3]


def test_every_sample_comes_at_every_place_equally_often():
    size, epochs = 8, 800
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permutation(size, 0, epoch)] += 1
    expected = epochs / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 25 < chi_square < 85  # (size - 1)**2 = 49 degrees of freedom, 0.1 % either side


def test_neighbours_of_one_epoch_are_no_neighbours_in_the_next():
    first, second = (permutation(2000, 0, epoch) for epoch in (0, 1))
    pairs = set(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))
    kept = pairs & set(zip(second[:-1].tolist(), second[1:].tolist(), strict=True))
    assert len(kept) < 8  # about one by chance


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("block", [1, 20, 50, 10_000])
def test_streams_read_what_a_walk_over_all_samples_gives(streams, block):
    sizes = [1, 17, 30, 5, 0, 40, 22, 9, 9, 31]
    source = SourceOrder("data", np.array(sizes), streams, 7, block)
    for stream in range(streams):
        start, end = source.span(stream)
        expected = [
            (epoch, *sample)
            for epoch in range(3)
            for sample in reference_stream(
                "data", sizes, streams, stream, seed=7, block=block, epoch=epoch
            )
        ]
        keys = list(source.read(0, stream, 0, 3 * (end - start)))
        assert [(key.epoch, key.shard, key.row) for key in keys] == expected
        for first in (0, 1, 13, end - start, 2 * (end - start) - 1):
            assert list(source.read(0, stream, first, 5)) == keys[first : first + 5]


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_epoch_holds_every_sample_once(streams, seed):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 40) for _ in range(23)]
    total, epochs, batch = sum(sizes), 4, 24
    keys = order_of(sizes, streams=streams, batch=batch, seed=seed)
    taken = list(keys.batches(keys.start(), epochs * total // batch + 2 * streams))
    every = [key for one in taken for key in one]
    for epoch in range(epochs):
        counts = Counter((key.shard, key.row) for key in every if key.epoch == epoch)
        assert set(counts.values()) == {1}
        assert len(counts) == total


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_the_ranks_together_read_the_batches_of_one(streams, world_size):
    sizes, batch = [13, 40, 22, 60, 35], 24
    whole = order_of(sizes, batch=batch, streams=streams)
    ranks = [
        order_of(sizes, batch=batch, streams=streams, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    parts = zip(*(each.batches(each.start(), 20) for each in ranks), strict=True)
    together = [[key for part in step for key in part] for step in parts]
    assert together == list(whole.batches(whole.start(), 20))


def test_a_rank_reads_the_streams_of_its_own_node_alone():
    for rank in range(4):
        order = order_of([50] * 8, batch=24, streams=2, rank=rank, world_size=4)
        keys = [key for batch in order.batches(order.start(), 30) for key in batch]
        assert {key.stream for key in keys} == {rank // 2}


@pytest.mark.parametrize("seed", range(8))
def test_a_run_goes_on_exactly_from_any_batch_on_any_number_of_ranks(seed):
    draw = random.Random(seed)
    order = mixture_of(
        [5, 3, 2.1],
        streams=draw.choice([1, 2, 3]),
        batch=24,
        phases=[(7, [5, 3, 2.1]), (30, [1, 0, 4]), (None, [0.2, 3, 1])],
    )
    whole = list(order.batches(order.start(), 60))
    state, found = order.start(), []
    for world_size in (1, 2, 4, 1, 3):
        number = draw.randint(1, 12)
        # What a checkpoint keeps is JSON.
        resumed = DataState(state.names, 1)
        resumed.load_state_dict(json.loads(json.dumps(state.state_dict())))
        ranks = [
            BatchOrder(order.sources, order.mixture, 24, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        parts = zip(*(each.batches(resumed, number) for each in ranks), strict=True)
        found += [[key for part in step for key in part] for step in parts]
        for _ in range(number):
            order.advance(resumed)
        state = resumed
    assert found == whole[: len(found)]


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(6))
def test_a_mixture_keeps_within_a_sample_of_its_shares_through_its_schedule(streams, seed):
    draw = random.Random(f"{streams}/{seed}")
    number, batch = draw.randint(2, 7), streams * draw.randint(1, 9)
    ends = sorted(draw.sample(range(1, 100), 4))
    phases = [
        (end, [draw.choice([0, 1, 5, 100, 1000]) for _ in range(number - 1)] + [1])
        for end in (*ends, None)
    ]
    order = mixture_of(phases[0][1], sizes=[3000], streams=streams, batch=batch, phases=phases)
    state, wanted = order.start(), [Fraction(0)] * number
    for step in range(150):
        weights = next(each for end, each in phases if end is None or step < end)
        for source, weight in enumerate(weights):
            wanted[source] += Fraction(weight * batch, sum(weights))
        order.advance(state)
        for taken, share in zip(state.taken.sum(1).tolist(), wanted, strict=True):
            assert abs(taken - share) < 1
    assert state.taken.sum() == 150 * batch
    assert state.taken.sum(0).tolist() == [150 * batch // streams] * streams


def test_batches_of_one_source_each_keep_their_shares_over_time():
    order = mixture_of([5, 3, 2], by_source=True)
    counts = Counter()
    for batch in order.batches(order.start(), 100):
        (source,) = {key.source for key in batch}
        counts[source] += 1
    assert counts == {0: 50, 1: 30, 2: 20}


def test_the_slots_of_a_batch_are_mixed():
    order = mixture_of([1, 1], batch=40, streams=2)
    for batch in order.batches(order.start(), 10):
        for part in (batch[:20], batch[20:]):  # a stream's part each
            assert sorted(key.source for key in part) == [0] * 10 + [1] * 10
            assert [key.source for key in part] != sorted(key.source for key in part)


def test_skipped_batches_leave_the_others_as_they_are():
    plain, skipping = mixture_of([2, 1]), mixture_of([2, 1], skipped=[(3, 5), (8, 8)])
    whole = list(plain.batches(plain.start(), 12))
    left = [batch for number, batch in enumerate(whole) if number not in (3, 4, 5, 8)]
    assert list(skipping.batches(skipping.start(), 8)) == left
    state = skipping.start()
    for _ in range(8):
        skipping.advance(state)
    assert state.batch == 12


CHANGES = [(3, 24), (5, 12), (8, 36)]


def test_batches_of_changing_size_read_on_where_the_last_one_ended():
    order = replace(order_of([50, 70, 40], streams=2, batch=12), changes=CHANGES)
    sizes = [12] * 3 + [24] * 2 + [12] * 3 + [36] * 4
    batches = list(order.batches(order.start(), 12))
    assert [len(batch) for batch in batches] == sizes == [order.size_at(k) for k in range(12)]
    plain = order_of([50, 70, 40], streams=2, batch=12)
    expected = plain.batches(plain.start(), sum(sizes) // 12)
    assert {key for batch in batches for key in batch} == {key for b in expected for key in b}


def test_batches_of_changing_size_are_the_same_from_any_state_on_any_number_of_ranks():
    whole = replace(mixture_of([3, 2, 1], sizes=(90, 90, 90)), changes=CHANGES)
    expected = list(whole.batches(whole.start(), 12))
    state = whole.start()
    for number in range(12):
        for world_size in (1, 2, 4):
            ranks = [replace(whole, rank=rank, world_size=world_size) for rank in range(world_size)]
            parts = zip(*(each.batches(state, 12 - number) for each in ranks), strict=True)
            found = [[key for part in batch for key in part] for batch in parts]
            assert found == expected[number:]
        whole.advance(state)


def test_sources_keep_their_shares_in_batches_of_changing_size():
    phases = [(4, [3.0, 2.0, 1.0]), (None, [1.0, 1.0, 4.0])]
    order = replace(mixture_of([1, 1, 1], sizes=(90, 90, 90), phases=phases), changes=CHANGES)
    state, wanted = order.start(), np.zeros(3)
    for batch in range(20):
        wanted += order.mixture.shares(batch) * order.size_at(batch)
        order.advance(state)
        assert np.all(abs(state.taken.sum(1) - wanted) < 1), batch


def test_a_changed_size_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="the batch has 15 samples; expected a multiple of 2"):
        replace(mixture_of([1, 1]), changes=[(2, 15)])
    with pytest.raises(ConfigError, match=r"a batch takes 200 samples .* which has 120"):
        replace(mixture_of([1, 1]), changes=[(2, 400)])


def test_a_source_that_joins_leaves_the_order_of_the_others_as_it_is():
    two, three = mixture_of([1, 1]), mixture_of([1, 1, 2])
    state = two.start()
    for _ in range(5):
        two.advance(state)
    joined = DataState([source.name for source in three.sources], 1)
    joined.load_state_dict(state.state_dict())
    assert joined.taken.tolist() == [*state.taken.tolist(), [0, 0]]
    sources = [source for source in three.sources if source.name != "source 0"]
    left = DataState([source.name for source in sources], 1)
    left.load_state_dict(state.state_dict())
    assert left.taken.tolist() == [state.taken.tolist()[1], [0, 0]]
    before, now = (
        {(key.source, key.stream, key.epoch, key.place): key for batch in batches for key in batch}
        for batches in (two.batches(state, 40), three.batches(joined, 20))
    )
    for source in (0, 1):
        own = {place: key for place, key in now.items() if place[0] == source}
        assert len(own) == 20 * 12 / 4
        assert own == {place: before[place] for place in own}


def test_seeds_and_names_have_their_own_orders():
    orders = {
        tuple(SourceOrder(name, np.array([20]), 1, seed).read(0, 0, 0, 20))
        for name in ("a", "b")
        for seed in range(10)
    }
    assert len(orders) == 20


def test_reading_touches_the_shards_of_one_block_at_a_time():
    sizes = np.full(200, 100)
    order = SourceOrder("data", sizes, 2, 0, block=2000)
    for stream in range(2):
        keys = list(order.read(0, stream, 0, 10_000))
        for first in range(0, 10_000, 2000):
            shards = {key.shard for key in keys[first : first + 2000]}
            assert len(shards) <= order.open_shards == 24


def test_the_shards_that_a_stream_reads_next_are_known_a_block_ahead():
    source = SourceOrder("data", np.full(40, 10), 2, 0, block=50)
    keys = list(source.read(0, 1, 0, 500))  # more than two epochs of 200
    for number, key in enumerate(keys[:400]):
        own, next_one = (
            {later.shard for later in keys[start : start + 50]}
            for start in (number - number % 50, number - number % 50 + 50)
        )
        ahead = source.shards_from(key)
        assert set(ahead[: len(own)]) == own
        assert set(ahead) == own | next_one
        assert len(ahead) == len(own | next_one)


def test_a_substitute_is_another_sample_of_the_same_block():
    source = SourceOrder("data", np.full(40, 10), 2, 0, block=50)
    keys = list(source.read(3, 1, 0, 450))  # more than two epochs of 200
    for key in keys[::7]:
        place = key.epoch * 200 + key.place
        block = keys[place - key.place % 50 :][:50]
        found = {source.substitute(key, attempt) for attempt in range(1, 30)}
        assert found <= set(block)
        assert len(found) > 15
        assert source.substitute(key, 1) == source.substitute(key, 1)


def test_neighbours_of_one_group_come_together_and_every_sample_once():
    sizes = np.array([30, 50, 20, 40, 60])
    clusters = [np.random.default_rng(n).integers(0, 5, size) for n, size in enumerate(sizes)]
    plain = SourceOrder("data", sizes, 2, 0, block=100)
    source = SourceOrder("data", sizes, 2, 0, block=100, groups=clusters.__getitem__, run=8)
    for stream in range(2):
        keys = list(source.read(0, stream, 0, 200))
        assert sorted(keys[:100]) != keys[:100]
        assert {key[:4] for key in keys} == {key[:4] for key in plain.read(0, stream, 0, 200)}
        found = [clusters[key.shard][key.row] for key in keys]
        runs = [set(found[first : first + 8]) for first in range(0, 96, 8)]
        assert np.mean([len(run) for run in runs]) < 1.6  # of five, where any 8 have 4.2
        assert len({tuple(run) for run in runs}) > 3
        # Runs are in a random order, not cluster by cluster.
        firsts = [next(iter(run)) for run in runs]
        assert sum(a != b for a, b in pairwise(firsts)) > 5


@pytest.mark.parametrize(
    ("batch", "streams", "world_size", "number", "what"),
    [
        (10, 1, 3, 3, "processes"),
        (2, 1, 4, 4, "processes"),
        (0, 1, 1, 1, "processes"),
        (9, 2, 3, 2, "streams of data"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused_with_both_numbers(
    batch, streams, world_size, number, what
):
    message = f"has {batch} samples; expected a multiple of {number}, the number of {what}"
    with pytest.raises(ConfigError, match=message):
        order_of([100], batch=batch, streams=streams, world_size=world_size)


def test_a_batch_larger_than_its_source_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="takes 11 samples of the source 'data', which has 10;"):
        order_of([4, 6], batch=11)
    phases = [(5, [1, 1]), (None, [1, 20])]
    with pytest.raises(ConfigError, match="takes 96 samples of the source 'source 1', which"):
        mixture_of([1, 1], sizes=[70], batch=100, phases=phases)


def test_fewer_samples_than_streams_are_refused():
    with pytest.raises(ConfigError, match="'data' has 3 samples for 4 streams; expected at least"):
        order_of([1, 2], batch=4, streams=4)
