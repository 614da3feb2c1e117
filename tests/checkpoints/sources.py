"""Checkpoints as other projects write them, small and with random weights."""

import gzip
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.tokenizer import default_bpe
from torch import Tensor, nn

from tests.builders import THINGS, make_image
from vlm.bundle import Bundle
from vlm.text.clip_bpe import clip_tokenizer

TEXTS = [
    *(text for pair in THINGS for text in pair),
    "A photo of a cat, 1987!", "一只 cat 坐在 the mat 上。", "x", "",
]  # fmt: skip
SPECIALS = ("<|startoftext|>", "<|endoftext|>")
TAIYI = {chr(0x4E00 + number): 49_408 + number for number in range(8067)}
"""As many Chinese characters as Taiyi's CLIP has, by the ids after CLIP's."""


def disturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Leave no weight at zero or one, where a wrong place would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.add_(0.2 * noise if "var" in name else 0.2 * (noise - 0.5))
    return model.eval()


def pixels(bundle: Bundle, count: int = 3) -> Tensor:
    """Return images as the bundle's transform makes them."""
    return torch.stack([bundle.transform(make_image(number)) for number in range(count)])


def close(ours: Tensor, theirs: Tensor) -> None:
    """Compare unit vectors as the project promises to."""
    torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), rtol=0, atol=1e-5)


def write_clip_vocabulary(folder: Path, *, added: dict[str, int] | None = None) -> None:
    """Write CLIP's vocabulary as transformers' older tokenizers have it."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*clip_tokenizer().vocabulary.pieces()[:-2], *SPECIALS]
    ids = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[1:48_895]
    content = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "merges.txt").write_text(content, encoding="utf-8")
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77 if not added else 512}
    names = dict(zip(("bos_token", "eos_token"), SPECIALS, strict=True))
    names |= {"pad_token": SPECIALS[1], "unk_token": SPECIALS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
