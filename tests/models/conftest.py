"""A tokenizer, and a batch for models of any kind."""

import pytest
import torch

from tests.builders import IMAGE_SIZE, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def batch(tokenizer):
    images = torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    texts = {
        "zh": tokenizer.encode(["红苹果", "小狗", "一只灰色的猫"]),
        "en": tokenizer.encode(["red apple", "small dog", "grey cat"]),
    }
    return images, texts
