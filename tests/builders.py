"""Small real inputs for tests: images, samples, a data folder, a tokenizer, a model, a bundle.

Everything here is a function of its arguments: two calls give the same bytes.
"""

import colorsys
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from vlm.bundle import save_bundle
from vlm.data.config import SourceConfig
from vlm.data.manifest import Manifest, read_manifest, write_manifest
from vlm.data.sample import Sample
from vlm.data.shards import write_shards
from vlm.data.source import Source, open_source
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.models.build import build_from_config, encoder_model_cfg
from vlm.models.config import ImageTowerConfig, ModelConfig, TextTowerConfig
from vlm.models.dual_encoder import DualEncoder
from vlm.text.config import SentencePieceConfig
from vlm.text.tokenizer import Tokenizer
from vlm.text.training import train_sentencepiece

THINGS = (
    ("red apple", "红苹果"),
    ("grey cat", "灰色的猫"),
    ("small dog", "小狗"),
    ("fast train", "快速列车"),
    ("blue sea", "蓝色的大海"),
    ("tall tree", "高高的树"),
    ("round moon", "圆圆的月亮"),
    ("old house", "老房子"),
    ("green tea", "绿茶"),
    ("yellow sun", "黄色的太阳"),
    ("white rabbit", "白兔"),
    ("hot soup", "热汤"),
)
"""Captions (English, Chinese) of the concepts that `make_samples` draws."""

THING_TEXTS = {"zh": [zh for _, zh in THINGS] * 3, "en": [en for en, _ in THINGS] * 3}
"""The same captions by language, each three times, as tokenizers are trained on them."""

IMAGE_SIZE = 32
"""Side of the tiny model's images."""

TINY_MODEL = ModelConfig(
    embed_dim=32,
    vision_cfg=ImageTowerConfig(timm_model_name="test_resnet", image_size=IMAGE_SIZE),
    text_cfg=TextTowerConfig(width=64, heads=2, layers=1),
)
"""Well under a million weights; builds in a fraction of a second and needs no download."""


def make_image(number: int, *, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Draw an RGB image whose colours and shape follow from its number."""
    hue = (number * 0.381966) % 1
    back, front = (
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(turn % 1, 0.7, 0.9))
        for turn in (hue, hue + 0.4)
    )
    image = Image.new("RGB", size, back)
    left, top = size[0] * (1 + number % 3) // 8, size[1] * (1 + number % 2) // 8
    ImageDraw.Draw(image).ellipse((left, top, left + size[0] // 2, top + size[1] // 2), fill=front)
    return image


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_sample(number: int, *, prefix: str = "sample", **changes: object) -> Sample:
    """Make sample `number`: its own image, and the captions of concept `number % 12`."""
    en, zh = THINGS[number % len(THINGS)]
    fields: dict[str, object] = {
        "uid": f"{prefix}-{number:04d}",
        "image": encoded(make_image(number)),
        "captions": {"en": [en, f"an image of a {en}"], "zh": [zh, f"{zh}的图片"]},
        "concept": f"thing-{number % len(THINGS)}",
        "source": ("drawing", "photo")[number // len(THINGS) % 2],
        "licence": "CC0-1.0",
        "labels": {"group": ("even", "odd")[number % 2]},
    }
    return Sample(**(fields | changes))


def make_samples(count: int, *, prefix: str = "sample") -> list[Sample]:
    """Make samples 0 to `count - 1`."""
    return [make_sample(number, prefix=prefix) for number in range(count)]


def write_split(
    folder: Path,
    samples: Iterable[Sample],
    *,
    split: str = "train",
    samples_per_shard: int = 5,
) -> Path:
    """Write samples as shards of a split, add it to the folder's manifest; return the folder."""
    entries = write_shards(samples, folder, split=split, samples_per_shard=samples_per_shard)
    has_manifest = (folder / "manifest.json").is_file()
    splits = dict(read_manifest(folder).splits) if has_manifest else {}
    write_manifest(folder, Manifest(splits=splits | {split: entries}))
    return folder


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write names and contents as a tar by Python's own writer; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_img2dataset(folder: Path, captions: Sequence[str], *, samples_per_shard: int) -> Path:
    """Write captions and images as img2dataset lays them out: `00000.tar`, `00000_stats.json`."""
    for shard, start in enumerate(range(0, len(captions), samples_per_shard)):
        members = []
        texts = captions[start : start + samples_per_shard]
        for number, caption in enumerate(texts):
            key = f"{shard:05d}{number:04d}"
            record = {"caption": caption, "url": f"x/{key}", "key": key, "status": "success"}
            image = encoded(make_image(start + number), "JPEG")
            texts_of = {"jpg": image, "txt": caption.encode(), "json": json.dumps(record).encode()}
            members += [(f"{key}.{extension}", content) for extension, content in texts_of.items()]
        write_tar(folder / f"{shard:05d}.tar", members)
        stats = {"count": len(texts) + 3, "successes": len(texts)}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    return folder


def of_split(folder: Path, split: str, *, where: Sequence[str] = ()) -> SourceConfig:
    """Return one split of a data folder as a source."""
    return SourceConfig(path=str(folder), split=split, where=tuple(where))


def open_split(folder: Path, split: str = "train") -> Source:
    """Open one split of a data folder."""
    return open_source(of_split(folder, split))


def tiny_tokenizer(*, context_length: int = 16, vocab_size: int = 320) -> Tokenizer:
    """Train a tokenizer on the captions of `THINGS`."""
    config = SentencePieceConfig(vocab_size=vocab_size, context_length=context_length)
    return train_sentencepiece(THING_TEXTS, config)


def tiny_model(
    tokenizer: Tokenizer, *, seed: int = 0, config: ModelConfig = TINY_MODEL
) -> DualEncoder:
    """Build the tiny model with random weights, in evaluation mode; torch's own seed is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_from_config(config, tokenizer).eval()


def tiny_bundle(
    folder: Path, *, seed: int = 0, context_length: int = 16, config: ModelConfig = TINY_MODEL
) -> Path:
    """Write the tiny model with its tokenizer as a bundle; return the folder."""
    tokenizer = tiny_tokenizer(context_length=context_length)
    save_bundle(
        folder,
        model=tiny_model(tokenizer, seed=seed, config=config),
        model_cfg=encoder_model_cfg(config, tokenizer),
        preprocess_cfg=preprocess_cfg(PreprocessConfig(), IMAGE_SIZE),
        tokenizer=tokenizer,
        languages=("zh", "en"),
    )
    return folder


def unique_captions(samples: Iterable[Sample], languages: Iterable[str]) -> list[str]:
    """Every caption once, in the order of first occurrence."""
    languages = list(languages)
    captions = (sample.captions for sample in samples)
    return list(
        dict.fromkeys(text for own in captions for code in languages for text in own.get(code, ()))
    )
