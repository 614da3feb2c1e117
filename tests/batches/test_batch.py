"""A batch moves to a device as a whole, and splits into the samples of its parts."""

import pytest
import torch

from vlm.batches.batch import Batch
from vlm.text.tokenizer import pad


def test_every_tensor_of_a_batch_moves_and_its_names_stay():
    batch = Batch(
        images=torch.zeros(2, 3, 4, 4),
        texts={"zh": pad([[1], [2]], 0), "en": pad([[1, 2], [3]], 0)},
        text_rows={"zh": torch.tensor([0, 1]), "en": torch.tensor([0, 1])},
        image_ids=torch.tensor([1, 2]),
        caption_ids={"zh": torch.tensor([3, 4]), "en": torch.tensor([5, 6])},
        uids=("a", "b"),
    )
    moved = batch.to(torch.device("meta"))
    tensors = [
        moved.images,
        moved.image_ids,
        *moved.caption_ids.values(),
        *moved.text_rows.values(),
        *(part for tokens in moved.texts.values() for part in (tokens.ids, tokens.mask)),
    ]
    assert len(tensors) == 10
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.uids == ("a", "b")
    assert batch.images.device.type == "cpu"


def batch_of_one_language_pairs():
    """Six samples: zh, en, zh, en, both and neither; a caption's id is its language and sample."""
    rows = {"zh": torch.tensor([0, 2, 4]), "en": torch.tensor([1, 3, 4])}
    return Batch(
        images=torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 1, 1),
        texts={"zh": pad([[10], [12, 7], [14]], 0), "en": pad([[21], [23], [24]], 0)},
        text_rows=rows,
        image_ids=torch.arange(6),
        caption_ids={"zh": rows["zh"] + 10, "en": rows["en"] + 20},
        uids=tuple("abcdef"),
        hidden_words={"zh": torch.tensor([[True, False], [False, True], [True, False]])},
    )


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
def test_a_part_has_its_own_samples_captions_and_no_others(number):
    whole = batch_of_one_language_pairs()
    found, first = [], 0
    for part in whole.split(number):
        for language, rows in part.text_rows.items():
            captions = zip(
                rows.tolist(), part.caption_ids[language].tolist(),
                part.texts[language].ids[:, 0].tolist(), strict=True,
            )  # fmt: skip
            found += [(first + row, *ids) for row, *ids in captions if row < len(part.uids)]
        first += len(part.uids)
    assert sorted(found) == [
        (0, 10, 10),
        (1, 21, 21),
        (2, 12, 12),
        (3, 23, 23),
        (4, 14, 14),
        (4, 24, 24),
    ]


def test_a_part_without_a_language_has_a_text_past_its_last_sample_and_hides_none_of_it():
    first, *_, last = batch_of_one_language_pairs().split(6)
    assert first.text_rows["en"].tolist() == [1]
    assert len(first.texts["en"].ids) == len(first.caption_ids["en"]) == 1
    assert {language: rows.tolist() for language, rows in last.text_rows.items()} == {
        "zh": [1],
        "en": [1],
    }
    assert first.hidden_words["zh"].tolist() == [[True, False]]
    assert not last.hidden_words["zh"].any()


def test_a_part_of_a_batch_without_a_language_is_without_it_too():
    whole = batch_of_one_language_pairs().split(6)[0]
    (again,) = whole.split(1)
    assert again.text_rows["en"].tolist() == [1]
    assert again.caption_ids["zh"].tolist() == [10]
