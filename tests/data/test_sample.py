"""A batch moves to a device as a whole."""

import torch

from vlm.data.sample import Batch
from vlm.text.tokenizer import pad


def test_every_tensor_of_a_batch_moves_and_its_names_stay():
    batch = Batch(
        images=torch.zeros(2, 3, 4, 4),
        texts={"zh": pad([[1], [2]], 0), "en": pad([[1, 2], [3]], 0)},
        image_ids=torch.tensor([1, 2]),
        caption_ids={"zh": torch.tensor([3, 4]), "en": torch.tensor([5, 6])},
        uids=("a", "b"),
    )
    moved = batch.to(torch.device("meta"))
    tensors = [
        moved.images,
        moved.image_ids,
        *moved.caption_ids.values(),
        *(part for tokens in moved.texts.values() for part in (tokens.ids, tokens.mask)),
    ]
    assert len(tensors) == 8
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.uids == ("a", "b")
    assert batch.images.device.type == "cpu"
