"""Options of a conversion."""

from dataclasses import dataclass
from pathlib import Path

from vlm.images.config import PreprocessConfig
from vlm.models.config import GrowthConfig


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What a source may not say itself."""

    model: str | None = None
    """For a weights file of open_clip: the model's name there, such as `ViT-B-32`."""
    tokenizer: str | None = None
    """`clip`, a tokenizer folder, or a `.model`, `vocab.txt` or `tokenizer.json` file; null is the
    source's own."""
    preprocess: PreprocessConfig | None = None
    """How images become tensors, where the source does not say it, or instead of what it says."""
    hf_config: Path | None = None
    """For a text tower of transformers: its `config.json`, or the folder that has it."""
    image_size: int | None = None
    """For M2-Encoder: another side of the images, whose positions are interpolated."""
    heads: int | None = None
    """For M2-Encoder: number of attention heads, where the width is not a published one."""
    context_length: int | None = None
    """Longest text in tokens, to make it shorter than the model's."""
    languages: tuple[str, ...] | None = None
    """Languages of the training captions, where the kind of source does not imply them."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """More that a model learns to read (Taiyi-Diffusion-XL, Wu et al. 2024)."""

    tokenizer: Path
    """Folder of a tokenizer that was extended from the source's."""
    growth: GrowthConfig
    """How new rows and positions start."""
