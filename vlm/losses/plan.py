"""How a contrastive loss is computed: who contrasts with whom, and what that may cost."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlm.distributed.config import Grouping, MeshShape
from vlm.errors import ConfigError

if TYPE_CHECKING:  # configurations cost no torch import: see `dtype_named`
    import torch

FEATURES, STRUCTURE, LOGITS = "teacher_features", "teacher_structure", "teacher_logits"
"""The losses of distillation, by name."""

WireDtype = Literal["float64", "float32", "bfloat16", "float16"]

# 2 MiB of float32 stays in a CPU core's cache; 256 MiB fills a GPU. Wider than high, because
# rows are contiguous.
_CPU_TILE, _GPU_TILE = (512, 1024), (8192, 8192)


@dataclass(frozen=True, kw_only=True)
class LossPlan:
    """Who contrasts with whom, on which mesh, in which arithmetic, with how much memory.

    Only `kind`, `group_size`, `grouping`, `label_smoothing` and `duplicates` change what is
    optimised; `wire_dtype` rounds the features. The others change time and memory alone.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    """`softmax` is CLIP's symmetric cross-entropy, `sigmoid` SigLIP's pairwise loss."""
    group_size: int | None = None
    """Ranks that contrast with each other, a divisor of their number; null is all: exact."""
    grouping: Grouping = "contiguous"
    """Groups of neighbouring ranks, or of every n-th rank."""
    mesh: MeshShape = "auto"
    """(rows, columns) of a group's ranks; `text` is (g, 1), `image` (1, g).

    `auto` is the squarest, which sends least, on one machine; on several it is machines x ranks of
    a machine, which sends images inside machines only. Where weights are divided over ranks and
    there are several copies of them, the ranks of a copy take the place of those of a machine.
    """
    label_smoothing: float = 0.0
    """Fraction of a softmax's target that is spread over all candidates, in [0, 1)."""
    duplicates: Literal["positive", "ignore"] = "positive"
    """Samples that share a concept or caption are positives, or are left out of the candidates."""
    tile: int | tuple[int, int] | None = None
    """Rows and columns of similarities computed at a time; null chooses by the device."""
    keep_logits: bool | Literal["auto"] = "auto"
    """Keep logits for the backward pass: all, none, or as many as `keep_logits_mib` hold."""
    keep_logits_mib: int = 24
    """Memory for kept logits under `auto`, in MiB a term."""
    accum_dtype: Literal["float32", "float64"] = "float32"
    """Type in which statistics and gradients add up; wider inputs widen it."""
    wire_dtype: WireDtype | None = None
    """Type to which features are rounded to travel; null is their own."""
    gradient_wire_dtype: WireDtype | None = None
    """Type to which gradients are rounded to travel; null is the type they add up in."""
    overlap: bool = True
    """Let features and gradients travel while the other tower computes."""
    even: bool = True
    """Every rank must have as many samples as the others.

    With False ranks may differ, and every sample of the world counts the same.
    """
    check_finite: bool = False
    """Refuse features that are not finite, on every rank."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing}; expected at least 0, less than 1"
            )
        if self.label_smoothing and self.kind == "sigmoid":
            raise ConfigError(
                f"label_smoothing is {self.label_smoothing} for a sigmoid loss; expected 0, for "
                "its targets are not a distribution"
            )
        if min(self.tile_shape("cpu")) < 1:  # the default tiles are valid on any device
            raise ConfigError(f"tile is {self.tile}; expected at least 1 row and 1 column")
        if self.keep_logits_mib < 0:
            raise ConfigError(f"keep_logits_mib is {self.keep_logits_mib}; expected at least 0")

    def tile_shape(self, device_type: str) -> tuple[int, int]:
        """Return the most rows and columns of a tile on a kind of device."""
        tile = self.tile
        if tile is None:
            tile = _CPU_TILE if device_type == "cpu" else _GPU_TILE
        return tile if isinstance(tile, tuple) else (tile, tile)

    @property
    def kept_bytes(self) -> float:
        """How many bytes of logits may be kept for the backward pass of a term."""
        if self.keep_logits == "auto":
            return self.keep_logits_mib * 2.0**20  # MiB
        return float("inf") if self.keep_logits else 0.0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrastive loss of a run."""

    plan: LossPlan = field(default_factory=LossPlan)
    """Who contrasts with whom, and how."""
    captions: Literal["apart", "together"] = "apart"
    """Contrast images with each language's captions apart, or with those of all languages.

    Together, an image's captions in all languages are its positives in one softmax.
    """
    second_weight: float = 1.0
    """Weight of a second caption's term, relative to a main caption's; at least 0."""
    text_text_weight: float = 0.0
    """Weight of contrasting the two languages' captions with each other, at least 0."""
    micro_batches: int = 1
    """Parts in which a rank encodes its batch; more need less memory and more time."""
    accumulation: Literal["exact", "one_pass"] = "exact"
    """How micro-batches contrast: as one batch, or, biased and quicker, each with those before."""

    def __post_init__(self) -> None:
        for name in ("second_weight", "text_text_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 0")
        if self.micro_batches < 1:
            raise ConfigError(f"micro_batches is {self.micro_batches}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Keeping what a frozen model knows: features are drawn to those that it has of the batch."""

    feature_weight: float = 0.0
    """Weight of the squared distance of features to the teacher's (CLIP-KD), at least 0."""
    structure_weight: float = 0.0
    """Weight of keeping how similar images are to images and captions to captions (SEED)."""
    logit_weight: float = 0.0
    """Weight of keeping how similar images and captions are (CLIP-KD's CRD)."""
    teacher: Path | None = None
    """Bundle of the teacher, with the run's tokenizer and image transform; null for that of
    `start_from`."""
    languages: tuple[str, ...] = ()
    """Languages that the teacher reads; by default those of its bundle."""
    across_languages: bool = True
    """Draw a caption in any other language to what the teacher makes of the same sample's main
    caption in one that it reads (Multilingual-CLIP)."""

    def __post_init__(self) -> None:
        for name in ("feature_weight", "structure_weight", "logit_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 0")

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the losses that are on, by their names."""
        weights = {
            FEATURES: self.feature_weight,
            STRUCTURE: self.structure_weight,
            LOGITS: self.logit_weight,
        }
        return {name: weight for name, weight in weights.items() if weight > 0}


def dtype_named(name: WireDtype) -> "torch.dtype":
    """Return the floating point type of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
