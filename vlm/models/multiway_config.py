"""The sizes of M2-Encoder's multiway towers, and the tensors of its released checkpoints."""

from collections.abc import Iterator
from dataclasses import dataclass

from vlm.errors import ConfigError

IMAGE_BRANCH, TEXT_BRANCH = "A", "B"
"""The names of the two sets of weights in a multiway layer."""

SHARED_BRANCH = IMAGE_BRANCH
"""The branch of the vision-language encoder that reads images and texts alike."""

POSITION_OFFSET = 2
"""Position tables follow fairseq: their first two rows stand for no position."""

TEMPERATURES = {
    "log_logit_scale": "logit_vl_scale",
    "log_unimodal_logit_scale": "logit_scale",
}
"""Names in a released checkpoint of the parameters that are called otherwise here."""

_NOT_HELD = ("norm.", "pooler.")


@dataclass(frozen=True, kw_only=True)
class MultiwayConfig:
    """M2-Encoder's towers; the defaults are those of its 0.4B model.

    The vocabulary comes from the tokenizer.
    """

    image_size: int = 224
    """Side of the square input, in pixels."""
    patch_size: int = 16
    """Side of a patch, in pixels; divides `image_size`."""
    width: int = 768
    """Width of the states."""
    heads: int = 12
    """Attention heads; divides `width`."""
    ffn_width: int = 3072
    """Width inside the feed-forward networks."""
    layers: int = 9
    """Layers of each uni-modal encoder."""
    vl_layers: int = 3
    """Layers of the vision-language encoder, which both sides share."""
    embed_dim: int = 768
    """Width of the common space."""
    text_positions: int = 1024
    """Rows of the texts' position table, two of which stand for no position."""
    drop_path: float = 0.0
    """Stochastic depth of the last layer, in [0, 1); it rises evenly from 0 at the first."""

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if name != "drop_path"}
        for name, size in sizes.items():
            if type(size) is not int or size < 1:
                raise ConfigError(f"{name} is {size!r}; expected an integer, at least 1")
        for whole, part in (("width", "heads"), ("image_size", "patch_size")):
            if sizes[whole] % sizes[part]:
                raise ConfigError(
                    f"{whole} is {sizes[whole]}; expected a multiple of {part}, {sizes[part]}"
                )
        if self.text_positions <= POSITION_OFFSET:
            raise ConfigError(
                f"text_positions is {self.text_positions}; expected more than {POSITION_OFFSET}"
            )
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path is {self.drop_path}; expected at least 0, less than 1")

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def image_positions(self) -> int:
        """Rows of the images' position table: the patches, the class token, and two more."""
        rows, columns = self.grid_size
        return rows * columns + 1 + POSITION_OFFSET

    @property
    def context_length(self) -> int:
        """Longest text in tokens that has positions."""
        return self.text_positions - POSITION_OFFSET

    @property
    def drop_paths(self) -> list[float]:
        """Stochastic depth of every layer of a side (Huang et al. 2016, section 3)."""
        steps = max(1, self.layers + self.vl_layers - 1)
        return [self.drop_path * step / steps for step in range(self.layers + self.vl_layers)]


def released_tensors(config: MultiwayConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint in M2-Encoder's format, by name."""
    width, patch = config.width, config.patch_size
    positions = f"backbone.encoder.embed_positions.{IMAGE_BRANCH}.weight"
    text_positions = f"backbone.encoder.embed_positions.{TEXT_BRANCH}.weight"
    heads = ("itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj")
    return {
        "backbone.text_embed.weight": (vocab_size, width),
        "backbone.vision_embed.mask_token": (1, 1, width),
        "backbone.vision_embed.cls_token": (1, 1, width),
        "backbone.vision_embed.proj.weight": (width, 3, patch, patch),
        "backbone.vision_embed.proj.bias": (width,),
        positions: (config.image_positions, width),
        text_positions: (config.text_positions, width),
        **dict(_stack_tensors("backbone.encoder", config, config.layers)),
        **dict(_stack_tensors("backbone_vl", config, config.vl_layers)),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
        **{f"{head}.fc.weight": (config.embed_dim, width) for head in heads},
        **dict.fromkeys(TEMPERATURES.values(), ()),
    }


def is_held(name: str) -> bool:
    """Return whether a released tensor has a place in `MultiwayEncoder`.

    The others are what nothing reads: the normalisation and the pooler of another objective, and
    the branch of the vision-language encoder that was built next to the shared one.
    """
    shared = not (name.startswith("backbone_vl.") and f".{TEXT_BRANCH}." in name)
    return shared and not name.startswith(_NOT_HELD)


def _stack_tensors(
    stack: str, config: MultiwayConfig, layers: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, ffn_width = config.width, config.ffn_width
    for branch in (IMAGE_BRANCH, TEXT_BRANCH):
        linears = {
            **{
                f"self_attn.{each}_proj.{branch}": (width, width) for each in ("k", "v", "q", "out")
            },
            f"ffn.{branch}.fc1": (ffn_width, width),
            f"ffn.{branch}.fc2": (width, ffn_width),
        }
        norms = {
            f"self_attn.inner_attn_ln.{branch}": width,
            f"self_attn_layer_norm.{branch}": width,
            f"ffn.{branch}.ffn_layernorm": ffn_width,
            f"final_layer_norm.{branch}": width,
        }
        for layer in range(layers):
            prefix = f"{stack}.layers.{layer}"
            for name, shape in linears.items():
                yield f"{prefix}.{name}.weight", shape
                yield f"{prefix}.{name}.bias", shape[:1]
            for name, size in norms.items():
                yield f"{prefix}.{name}.weight", (size,)
                yield f"{prefix}.{name}.bias", (size,)
        yield f"{stack}.layer_norm.{branch}.weight", (width,)
        yield f"{stack}.layer_norm.{branch}.bias", (width,)
