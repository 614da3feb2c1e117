"""M2-Encoder's released checkpoints (Guo et al. 2024), whose sizes are known by their shapes."""

from collections.abc import Mapping
from dataclasses import asdict
from math import isqrt

from torch import Tensor

from vlm.checkpoints.accounting import Origin
from vlm.checkpoints.config import ConversionConfig
from vlm.checkpoints.reading import Tensors, count_layers
from vlm.checkpoints.recipe import Recipe, read_tokenizer
from vlm.errors import CheckpointError
from vlm.images.config import PreprocessConfig
from vlm.images.transforms import preprocess_cfg
from vlm.models.multiway import resized_image_positions
from vlm.models.multiway_config import POSITION_OFFSET, TEMPERATURES, MultiwayConfig
from vlm.text.importing import GLM_CONTEXT_LENGTH

ALLOWED = (r"visual_tokenizer\..*", r"norm\..*", r"pooler\..*", r"backbone_vl\..*\.B\..*")
"""What no feature needs: targets of training, an unused head, the texts' branch of shared layers.

Texts go through the shared layers by the images' branch.
"""

_ROWS = "backbone.text_embed.weight"
_POSITIONS = "backbone.encoder.embed_positions.A.weight"
PUBLISHED_HEADS = {768: 12, 1024: 16, 4096: 32}
"""Attention heads by width. No tensor's shape shows them, and another number changes features."""
_CLASS_TOKEN = 1


def is_m2_encoder(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors have the names of M2-Encoder."""
    return _ROWS in tensors and "itc_vl_image_proj.fc.weight" in tensors


def origin_of(name: str) -> Origin:
    """Return where one of our tensors is in M2-Encoder's files."""
    return Origin((TEMPERATURES.get(name, name),))


def read_m2_encoder(tensors: Tensors, config: ConversionConfig) -> Recipe:
    """Understand an M2-Encoder checkpoint, of the three published sizes or any other."""
    towers = multiway_config(tensors, heads=config.heads)
    if config.tokenizer is None:
        raise CheckpointError(
            "an M2-Encoder checkpoint holds no tokenizer; name its sp.model with --tokenizer"
        )
    vocabulary = len(tensors[_ROWS])
    tokenizer = read_tokenizer(
        config,
        config.tokenizer,
        rows=vocabulary,
        positions=towers.context_length,
        context_length=GLM_CONTEXT_LENGTH,
    )
    if config.image_size not in (None, towers.image_size):
        towers = MultiwayConfig(**asdict(towers) | {"image_size": config.image_size})
        positions = resized_image_positions(tensors[_POSITIONS], towers.grid_size)
        tensors = tensors | {_POSITIONS: positions}
    # M2-Encoder squashes images, and brings their values to [-1, 1].
    half = (0.5, 0.5, 0.5)
    preprocess = config.preprocess or PreprocessConfig(mean=half, std=half, resize_mode="squash")
    return Recipe(
        kind="an M2-Encoder checkpoint",
        tensors=tensors,
        origin_of=origin_of,
        allowed=ALLOWED,
        model_cfg={"multiway": asdict(towers), "vocab_size": vocabulary},
        preprocess_cfg=preprocess_cfg(preprocess, towers.image_size),
        tokenizer=tokenizer,
        languages=config.languages or ("zh", "en"),
    )


def multiway_config(tensors: Mapping[str, Tensor], *, heads: int | None = None) -> MultiwayConfig:
    """Return the sizes of towers; `heads` is needed where no published model is as wide."""
    try:
        width, _, patch, _ = tensors["backbone.vision_embed.proj.weight"].shape
        heads = heads or PUBLISHED_HEADS.get(width)
        if heads is None:
            raise CheckpointError(
                f"the towers are {width} wide, and no tensor shows their number of attention "
                f"heads; expected --heads, or a width of {', '.join(map(str, PUBLISHED_HEADS))}"
            )
        patches = len(tensors[_POSITIONS]) - POSITION_OFFSET - _CLASS_TOKEN
        return MultiwayConfig(
            image_size=patch * isqrt(patches),
            patch_size=patch,
            width=width,
            heads=heads,
            ffn_width=len(tensors["backbone.encoder.layers.0.ffn.A.fc1.bias"]),
            layers=count_layers(tensors, r"backbone\.encoder\.layers\.(\d+)\."),
            vl_layers=count_layers(tensors, r"backbone_vl\.layers\.(\d+)\."),
            embed_dim=len(tensors["itc_vl_image_proj.fc.weight"]),
            text_positions=len(tensors["backbone.encoder.embed_positions.B.weight"]),
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the towers' size is unknown: {error} is missing") from error
