"""What is read depends on seed and position, never on processes, workers or interruptions."""

import io
import random
from collections import Counter
from multiprocessing import Pipe
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from tests.builders import make_sample, make_samples, open_split, tiny_tokenizer, write_split
from vlm.batches.collate import MaskPlan, collate
from vlm.batches.config import CaptionConfig, DataConfig
from vlm.batches.examples import TrainingExamples, choose_caption
from vlm.batches.loader import TrainingLoader
from vlm.batches.mixture import BatchOrder, Mixture
from vlm.batches.order import SampleKey, SourceOrder
from vlm.errors import ConfigError, DataError
from vlm.images.config import AugmentationConfig, PreprocessConfig
from vlm.images.transforms import TrainingTransform
from vlm.text.caption_ids import text_id

SIZE = 18
ALONE = Mixture(phases=[(None, [1.0])])
TRANSFORM = TrainingTransform(
    PreprocessConfig(), AugmentationConfig(rotation=20.0, brightness=0.3, flip=0.5), 16
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(context_length=32)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return open_split(write_split(folder, make_samples(SIZE)), "train")


def examples_of(samples, *, seed=0, keep_decoded=False, **captions):
    return TrainingExamples(
        [samples], order_of(samples, 1).sources, TRANSFORM, CaptionConfig(**captions), seed,
        keep_decoded,
    )  # fmt: skip


def order_of(samples, batch=6, *, seed=0, **ranks):
    source = SourceOrder("data", np.array(samples.sizes), seed=seed)
    return BatchOrder([source], ALONE, batch, seed=seed, **ranks)


def read(samples, tokenizer, *, first=0, last, workers=0, seed=0, **ranks):
    """Read batches of 6 between two positions."""
    order = order_of(samples, seed=seed, **ranks)
    loader = TrainingLoader(examples_of(samples, seed=seed), order, tokenizer, workers=workers)
    state = order.start()
    for _ in range(first // 6):
        order.advance(state)
    return list(loader.read(state, (last - first) // 6))


def key_of(samples, place, epoch=0):
    """Name the sample at a place of a split."""
    shard = 0
    while place >= samples.sizes[shard]:
        place -= samples.sizes[shard]
        shard += 1
    return SampleKey(0, shard, place, epoch, stream=0, place=0)


MASKS = MaskPlan(text_ratio=0.5, image_ratio=0.25, grid=(2, 4))


def everything_in(batch):
    """Return all that a batch holds, as values that can be compared."""
    return {
        "images": batch.images.tolist(),
        "image_ids": batch.image_ids.tolist(),
        "uids": batch.uids,
        "text_rows": {name: rows.tolist() for name, rows in batch.text_rows.items()},
        "caption_ids": {name: ids.tolist() for name, ids in batch.caption_ids.items()},
        "ids": {name: tokens.ids.tolist() for name, tokens in batch.texts.items()},
        "mask": {name: tokens.mask.tolist() for name, tokens in batch.texts.items()},
    }


def texts_in(batch, tokenizer, language):
    tokens = batch.texts[language]
    return [tokenizer.decode(row.tolist()) for row in tokens.ids]


def uids_in(batches):
    return [uid for batch in batches for uid in batch.uids]


def test_a_batch_holds_the_samples_its_uids_name(samples, tokenizer):
    by_uid = {sample.uid: sample for sample in samples}
    for batch in read(samples, tokenizer, last=SIZE):
        for row, uid in enumerate(batch.uids):
            sample = by_uid[uid]
            assert batch.image_ids[row] == text_id(sample.concept)
            for language in ("zh", "en"):
                text = texts_in(batch, tokenizer, language)[row]
                assert text in sample.captions[language]
                assert batch.caption_ids[language][row] == text_id(text)
        assert batch.images.shape == (6, 3, 16, 16)
        assert batch.images.dtype == torch.float32
        assert batch.image_ids.dtype == batch.caption_ids["en"].dtype == torch.int64


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_batches_of_all_ranks_together_are_those_of_one(samples, tokenizer, world_size):
    whole = read(samples, tokenizer, last=2 * SIZE)
    parts = [
        read(samples, tokenizer, last=2 * SIZE, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {len(whole)} == {6}
    for expected, *found in zip(whole, *parts, strict=True):
        assert torch.cat([batch.images for batch in found]).equal(expected.images)
        assert torch.cat([batch.image_ids for batch in found]).equal(expected.image_ids)
        assert sum((batch.uids for batch in found), ()) == expected.uids
        for language in ("zh", "en"):
            ids = torch.cat([batch.caption_ids[language] for batch in found])
            assert ids.equal(expected.caption_ids[language])
            texts = [text for batch in found for text in texts_in(batch, tokenizer, language)]
            assert texts == texts_in(expected, tokenizer, language)


@pytest.mark.parametrize("first", [6, 12, 18, 24])
def test_reading_from_a_position_is_the_tail_of_reading_from_the_start(samples, tokenizer, first):
    whole = read(samples, tokenizer, last=36)
    tail = read(samples, tokenizer, first=first, last=36)
    assert len(tail) == len(whole) - first // 6
    for expected, found in zip(whole[first // 6 :], tail, strict=True):
        assert everything_in(found) == everything_in(expected)


def test_a_position_between_batches_is_continued_by_another_number_of_ranks(samples, tokenizer):
    whole = uids_in(read(samples, tokenizer, last=36))
    first = uids_in(read(samples, tokenizer, last=12))
    halves = [
        read(samples, tokenizer, first=12, last=36, rank=rank, world_size=2) for rank in (0, 1)
    ]
    rest = [uid for step in zip(*halves, strict=True) for batch in step for uid in batch.uids]
    assert first + rest == whole


def test_epochs_and_seeds_have_their_own_orders(samples, tokenizer):
    batches = read(samples, tokenizer, last=2 * SIZE)
    first, second = uids_in(batches[:3]), uids_in(batches[3:])
    assert sorted(first) == sorted(second) == [f"sample-{n:04d}" for n in range(SIZE)]
    assert first != second
    assert uids_in(read(samples, tokenizer, last=SIZE, seed=1)) != first


def test_worker_processes_change_nothing(samples, tokenizer):
    alone = read(samples, tokenizer, first=6, last=42)
    shared = read(samples, tokenizer, first=6, last=42, workers=2)
    assert len(alone) == 6
    assert [everything_in(b) for b in alone] == [everything_in(b) for b in shared]


def test_a_batch_is_sent_whole_and_with_one_tensor_in_shared_memory(samples, tokenizer):
    batch = masked(samples, tokenizer, second=True)[0]
    shared = []

    class Sending(ForkingPickler):
        def reducer_override(self, value):
            if isinstance(value, torch.Tensor):
                shared.append(value)
            return NotImplemented

    message = io.BytesIO()
    Sending(message).dump(batch)
    reader, writer = Pipe(duplex=False)  # as a worker's queue does
    writer.send(batch)
    received = reader.recv()
    assert [each.data_ptr() for each in shared] == [batch.images.data_ptr()]
    assert everything_in(received) == everything_in(batch)
    assert torch.equal(received.hidden_patches, batch.hidden_patches)
    for name, tokens in batch.texts.items():
        assert received.texts[name].mask.dtype == tokens.mask.dtype == torch.bool
    for name, mask in batch.hidden_words.items():
        assert torch.equal(received.hidden_words[name], mask)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [1, 2, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sources_streams_ranks_workers_and_restarts_give_the_same_batches(
    tmp_path, tokenizer, streams, ranks
):
    draw = random.Random(f"{streams}/{ranks}")
    sources = [
        open_split(write_split(tmp_path / name, make_samples(size, prefix=name)))
        for name, size in (("few", 25), ("more", 60))
    ]
    orders = [
        SourceOrder(name, np.array(source.sizes), streams, seed=1, block=20)
        for name, source in zip(("few", "more"), sources, strict=True)
    ]
    phases = [(3, [1.0, 1.0]), (None, [1.0, 3.0])]
    examples = TrainingExamples(sources, orders, TRANSFORM, CaptionConfig(), 1)

    def batches(state, number, *, rank=0, world_size=1, workers=0):
        order = BatchOrder(orders, Mixture(phases=phases), 24, 1, rank, world_size)
        loader = TrainingLoader(examples, order, tokenizer, workers=workers)
        return list(loader.read(state, number))

    whole = BatchOrder(orders, Mixture(phases=phases), 24, 1)
    state, expected, found = whole.start(), batches(whole.start(), 10), []
    for first in range(0, 10, 5):
        workers = draw.choice([0, 1, 2])
        state = state.copy()  # as from a checkpoint
        parts = [
            batches(state, 5, rank=rank, world_size=ranks, workers=workers) for rank in range(ranks)
        ]
        found += [sum((part.uids for part in step), ()) for step in zip(*parts, strict=True)]
        for step, of_ranks in zip(expected[first:], zip(*parts, strict=True), strict=False):
            assert torch.cat([part.images for part in of_ranks]).equal(step.images)
        for _ in range(5):
            whole.advance(state)
    assert found == [batch.uids for batch in expected]


def test_what_is_kept_is_not_read_again(tmp_path):
    split = open_split(write_split(tmp_path, make_samples(4)))
    kept = examples_of(split, keep_decoded=True)
    first = kept[key_of(split, 2)]
    split.at = None  # nothing can be read from it
    again = kept[key_of(split, 2)]
    assert again.image.equal(first.image)
    assert (again.uid, again.captions) == (first.uid, first.captions)


def test_keeping_decoded_images_changes_nothing(samples):
    fresh = examples_of(samples)
    kept = examples_of(samples, keep_decoded=True)
    for epoch in range(3):
        for place in range(SIZE):
            first, second = (e[key_of(samples, place, epoch)] for e in (fresh, kept))
            assert first.image.equal(second.image)
            assert first.captions == second.captions


def test_global_generators_have_no_influence(samples, tokenizer):
    found = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append([everything_in(b) for b in read(samples, tokenizer, last=6)])
    assert found[0] == found[1]


def test_an_example_follows_from_seed_epoch_and_uid_wherever_it_lies(samples, tmp_path):
    moved = [samples[7], *make_samples(3, prefix="other"), samples[2]]
    elsewhere = open_split(write_split(tmp_path, moved, samples_per_shard=2), "train")
    for place, other_place in ((7, 0), (2, 4)):
        for epoch in range(4):
            first = examples_of(samples)[key_of(samples, place, epoch)]
            second = examples_of(elsewhere)[key_of(elsewhere, other_place, epoch)]
            assert first.uid == second.uid
            assert first.captions == second.captions
            assert first.image.equal(second.image)


def test_epochs_seeds_and_samples_draw_apart(samples):
    image = examples_of(samples)[key_of(samples, 0, 0)].image
    assert not image.equal(examples_of(samples)[key_of(samples, 0, 1)].image)
    assert not image.equal(examples_of(samples, seed=1)[key_of(samples, 0, 0)].image)
    choices = [
        tuple(
            examples_of(samples)[key_of(samples, place, epoch)].captions["en"]
            for epoch in range(12)
        )
        for place in (0, 12)  # two samples of one concept, so with the same captions
    ]
    assert samples[0].captions == samples[12].captions
    assert choices[0] != choices[1]


@pytest.mark.parametrize(("main_ratio", "main"), [(1.0, True), (0.0, False)], ids=["all", "none"])
def test_the_main_caption_is_always_or_never_chosen(samples, main_ratio, main):
    examples = examples_of(samples, main_ratio=main_ratio)
    for place in range(SIZE):
        for epoch in range(4):
            for language, text in examples[key_of(samples, place, epoch)].captions.items():
                assert (text == samples[place].captions[language][0]) == main


def test_captions_are_chosen_as_often_as_asked():
    sample = make_sample(0, captions={"en": ["main", "one", "two", "three"]})
    rng = random.Random(0)
    counts = Counter(
        choose_caption(sample, "en", CaptionConfig(), rng, main_ratio=0.4) for _ in range(4000)
    )
    assert {text: round(count / 4000, 1) for text, count in counts.items()} == {
        "main": 0.4, "one": 0.2, "two": 0.2, "three": 0.2,
    }  # fmt: skip


def test_a_sample_with_one_caption_always_gives_it():
    sample = make_sample(0, captions={"en": ["only"]})
    chosen = {
        choose_caption(sample, "en", CaptionConfig(), random.Random(seed), main_ratio=0.0)
        for seed in range(20)
    }
    assert chosen == {"only"}


def batch_of(folder, tokenizer, *captions, masks=None, **options):
    """Collate a sample for each of several captions by language."""
    samples = [make_sample(number, captions=each) for number, each in enumerate(captions)]
    split = open_split(write_split(folder, samples))
    examples = examples_of(split, **options)
    keys = [key_of(split, place) for place in range(len(samples))]
    return collate([examples[key] for key in keys], tokenizer=tokenizer, masks=masks)


def test_a_batch_has_the_captions_that_are_there_with_the_rows_of_their_samples(
    tmp_path, tokenizer
):
    batch = batch_of(
        tmp_path, tokenizer, {"zh": ["红苹果"]}, {"en": ["grey cat"]},
        {"zh": ["小狗"], "en": ["small dog"]},
    )  # fmt: skip
    assert texts_in(batch, tokenizer, "zh") == ["红苹果", "小狗"]
    assert texts_in(batch, tokenizer, "en") == ["grey cat", "small dog"]
    assert batch.text_rows["zh"].tolist() == [0, 2]
    assert batch.text_rows["en"].tolist() == [1, 2]
    assert batch.caption_ids["zh"].tolist() == [text_id("红苹果"), text_id("小狗")]
    assert batch.caption_ids["en"].tolist() == [text_id("grey cat"), text_id("small dog")]
    assert len(batch.images) == len(batch.image_ids) == len(batch.uids) == 3


def test_a_language_that_no_sample_has_is_an_empty_text_past_the_last(tmp_path, tokenizer):
    batch = batch_of(tmp_path, tokenizer, {"en": ["grey cat"]}, {"en": ["tea"]}, masks=MASKS)
    assert texts_in(batch, tokenizer, "zh") == [""]
    assert batch.text_rows["zh"].tolist() == [2]
    assert not batch.hidden_words["zh"].any()
    assert batch.hidden_words["en"].any(dim=1).all()


def test_a_second_caption_is_one_of_the_others_and_has_a_term_of_its_own(tmp_path, tokenizer):
    captions = {"zh": ["红苹果", "苹果"], "en": ["red apple", "apple"]}
    batch = batch_of(
        tmp_path, tokenizer, captions, {"en": ["grey cat"]}, main_ratio=1.0, second=True
    )
    found = {language: texts_in(batch, tokenizer, language) for language in batch.texts}
    assert found == {
        "zh": ["红苹果"],
        "en": ["red apple", "grey cat"],
        "zh second": ["苹果"],
        "en second": ["apple", "grey cat"],  # there is no other
    }
    assert set(batch.caption_ids) == set(batch.text_rows) == set(found)


def test_each_language_is_padded_to_its_own_longest_text(samples, tokenizer):
    for batch in read(samples, tokenizer, last=SIZE):
        for language in ("zh", "en"):
            tokens = batch.texts[language]
            lengths = [
                tokenizer.encode([text]).ids.shape[1]
                for text in texts_in(batch, tokenizer, language)
            ]
            assert tokens.ids.shape[1] == max(lengths)
            assert tokens.mask.sum(dim=1).tolist() == lengths


def test_only_the_languages_asked_for_are_read(samples, tokenizer):
    order = order_of(samples, 2)
    loader = TrainingLoader(examples_of(samples, languages=("en",)), order, tokenizer, workers=0)
    batch = next(loader.read(order.start(), 1))
    assert set(batch.texts) == set(batch.caption_ids) == {"en"}


def test_equal_concepts_and_captions_share_their_ids(samples, tokenizer):
    order = order_of(samples, SIZE)
    loader = TrainingLoader(examples_of(samples, main_ratio=1.0), order, tokenizer, workers=0)
    batch = next(loader.read(order.start(), 1))
    concepts = [samples[int(uid.rsplit("-", 1)[1])].concept for uid in batch.uids]
    expected = [[a == b for b in concepts] for a in concepts]
    for ids in (batch.image_ids, batch.caption_ids["en"], batch.caption_ids["zh"]):
        assert (ids[:, None] == ids[None, :]).tolist() == expected


BROKEN = b"\x89PNG\r\n\x1a\n and no image"


def damaged_split(folder, damaged=(1, 4)):
    """Write 20 samples: of two the image is damaged, of one there is no caption in zh or en."""
    samples = make_samples(20)
    for number in damaged:
        samples[number] = make_sample(number, image=BROKEN)
    samples[9] = make_sample(9, captions={"fr": ["un chat"]})
    return open_split(write_split(folder, samples), "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_used_is_replaced_named_and_said_why(tmp_path, tokenizer, workers):
    split = damaged_split(tmp_path)
    order = order_of(split, 5)
    loader = TrainingLoader(examples_of(split), order, tokenizer, workers=workers)
    batches = list(loader.read(order.start(), 4))  # one epoch
    expected = [key for keys in order.batches(order.start(), 4) for key in keys]
    skipped = [each for batch in batches for each in batch.skipped]
    assert {each.uid for each in skipped} == {"sample-0001", "sample-0004", "sample-0009"}
    for each in skipped:
        assert each.address.startswith(str(tmp_path / "train-0000"))
        assert each.uid in each.reason
    assert {each.reason.partition(" has ")[2] for each in skipped} >= {
        "no caption in zh or en, only in fr"
    }
    changed = 0
    for uid, key in zip(uids_in(batches), expected, strict=True):
        sample = split.at(key.shard, key.row)
        changed += uid != sample.uid
        assert (uid != sample.uid) == (sample.uid in {each.uid for each in skipped})
    assert changed == 3


def test_substitutes_are_the_same_on_every_rank_and_after_a_restart(tmp_path, tokenizer):
    split = damaged_split(tmp_path, damaged=range(0, 20, 3))
    whole = TrainingLoader(examples_of(split), order_of(split, 4), tokenizer, workers=0)
    state = whole.order.start()
    expected = [(batch.uids, batch.skipped) for batch in whole.read(state, 10)]
    for _ in range(3):
        whole.order.advance(state)
    parts = [
        TrainingLoader(
            examples_of(split), order_of(split, 4, rank=rank, world_size=2), tokenizer, workers=0
        ).read(state, 7)
        for rank in (0, 1)
    ]
    steps = [
        (one.uids + two.uids, one.skipped + two.skipped) for one, two in zip(*parts, strict=True)
    ]
    assert steps == expected[3:]


def test_a_shard_without_a_usable_sample_ends_in_an_error_with_both_ends(tmp_path, tokenizer):
    samples = [make_sample(number, image=BROKEN) for number in range(4)]
    split = open_split(write_split(tmp_path, samples), "train")
    loader = TrainingLoader(examples_of(split), order_of(split, 2), tokenizer, workers=0)
    message = r"#\d and 15 samples in its place cannot be used; .*is not one of JPEG"
    with pytest.raises(DataError, match=message):
        list(loader.read(loader.order.start(), 1))


def test_a_fault_that_is_not_the_samples_is_never_replaced(samples, monkeypatch):
    examples = examples_of(samples)

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(TrainingTransform, "decode", lambda *_, **__: exhausted())
    with pytest.raises(MemoryError):
        examples[key_of(samples, 0)]


def test_nothing_is_read_between_equal_positions(samples, tokenizer):
    assert read(samples, tokenizer, first=12, last=12) == []


@pytest.mark.parametrize(
    "fields",
    [{"languages": ()}, {"languages": ("zh", "zh")}, {"main_ratio": -0.1}, {"main_ratio": 1.1}],
    ids=["no language", "twice", "below 0", "above 1"],
)
def test_captions_that_cannot_be_chosen_are_refused(fields):
    with pytest.raises(ConfigError, match=r"at least one language, each once, and a ratio in"):
        CaptionConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"workers": -1}, "workers is -1; expected at least 0"),
        ({"streams": -2}, "streams is -2; expected at least 0"),
        ({"folder": "a", "sources": ("b",)}, "found both the folder a and sources"),
    ],
    ids=["batch", "workers", "streams", "both"],
)
def test_settings_that_cannot_be_read_by_are_refused(fields, problem):
    with pytest.raises(ConfigError, match=problem):
        DataConfig(**fields)


def masked(samples, tokenizer, masks=MASKS, *, seed=0, second=False):
    examples = examples_of(samples, seed=seed, second=second)
    keys = [key_of(samples, place) for place in range(6)]
    return [
        collate([examples[key] for key in part], tokenizer=tokenizer, masks=masks)
        for part in (keys, keys[:2], keys[2:])
    ]


def test_what_is_hidden_of_a_sample_does_not_depend_on_its_batch(samples, tokenizer):
    whole, *parts = masked(samples, tokenizer)
    assert torch.equal(whole.hidden_patches, torch.cat([part.hidden_patches for part in parts]))
    for language, mask in whole.hidden_words.items():
        assert mask.shape == whole.texts[language].ids.shape
        split = [row for part in parts for row in part.hidden_words[language]]
        for one, other in zip(mask, split, strict=True):
            assert one.nonzero().tolist() == other.nonzero().tolist()


def test_so_many_patches_of_each_image_are_hidden_and_of_each_text_some_tokens(samples, tokenizer):
    batch = masked(samples, tokenizer)[0]
    assert batch.hidden_patches.shape == (6, 8)
    assert batch.hidden_patches.sum(dim=1).tolist() == [2] * 6
    for language, mask in batch.hidden_words.items():
        tokens = batch.texts[language]
        assert mask.any(dim=1).all()
        assert not (mask & ~tokens.mask).any()


def test_another_seed_hides_something_else(samples, tokenizer):
    one, other = (masked(samples, tokenizer, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(one.hidden_patches, other.hidden_patches)


def test_second_captions_are_not_masked_and_nothing_is_without_a_share(samples, tokenizer):
    batch = masked(samples, tokenizer, second=True)[0]
    assert set(batch.texts) == {"zh", "en", "zh second", "en second"}
    assert set(batch.hidden_words) == {"zh", "en"}
    bare = masked(samples, tokenizer, MaskPlan())[0]
    assert bare.hidden_words == {}
    assert bare.hidden_patches is None


def test_parts_of_a_batch_keep_what_is_hidden_of_their_samples(samples, tokenizer):
    batch = masked(samples, tokenizer)[0]
    parts = batch.split(3)
    assert torch.equal(torch.cat([part.hidden_patches for part in parts]), batch.hidden_patches)
    for language, mask in batch.hidden_words.items():
        assert torch.equal(torch.cat([part.hidden_words[language] for part in parts]), mask)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.hidden_patches, batch.hidden_patches)
    assert moved.hidden_words.keys() == batch.hidden_words.keys()
