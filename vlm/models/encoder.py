"""`Encoder`: what every model of images and texts can do, whatever its towers are."""

from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlm.text.tokenizer import TokenBatch

MAIN = "main"
"""The head whose features are the model's: those that `encode_image` and `encode_text` give."""

UNIMODAL = "unimodal"
"""A second head on what each side knows before the sides share a network, where a model has it."""


class States(NamedTuple):
    """What a tower says of its inputs: a vector a head for each, and a vector a token."""

    features: dict[str, Float[Tensor, "batch dim"]]
    """By head, `MAIN` first; not normalised."""
    tokens: Float[Tensor, "batch length width"]
    """The last states of a text's tokens, or of an image's patches row by row."""
    mask: Bool[Tensor, "batch length"] | None
    """True at the tokens of a text, false at padding; None for images: all patches count."""


@runtime_checkable
class Encoder(Protocol):
    """A module that maps images and texts to unit vectors of one space."""

    log_logit_scale: nn.Parameter
    """The logarithm of the inverse temperature."""
    logit_bias: nn.Parameter | None
    """Bias of a sigmoid loss's logits, where the model has one."""

    @property
    def embed_dim(self) -> int:
        """Width of the common space."""

    @property
    def image_width(self) -> int:
        """Width of a patch's state."""

    @property
    def text_width(self) -> int:
        """Width of a token's state."""

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches that `image_states` gives."""

    @property
    def logit_scales(self) -> dict[str, Float[Tensor, ""]]:
        """The inverse temperature of each head, with gradient."""

    @property
    def token_embedding(self) -> nn.Embedding:
        """The rows of the vocabulary."""

    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each image."""

    def encode_text(self, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each text."""

    def image_features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the features of images by head, not normalised."""

    def text_features(self, tokens: TokenBatch) -> dict[str, Float[Tensor, "batch dim"]]:
        """Return the features of texts by head, not normalised."""

    def image_states(
        self,
        images: Float[Tensor, "batch 3 height width"],
        hidden: Bool[Tensor, "batch patches"] | None = None,
    ) -> States:
        """Return the features of images and the states of their patches.

        Args:
            images: Normalised images.
            hidden: True at patches, of `grid_size` row by row, that the tower must not see.
        """

    def text_states(
        self,
        tokens: TokenBatch,
        replaced: tuple[Bool[Tensor, "batch length"], Float[Tensor, " width"]] | None = None,
    ) -> States:
        """Return the features of texts and the states of their tokens.

        Args:
            tokens: Padded texts.
            replaced: Where true, the given vector takes the place of a token's embedding.
        """

    def clamp_logit_scale(self) -> None:
        """Bring the temperatures back into their bound; called after every optimizer step."""

    def set_grad_checkpointing(self, enable: bool) -> None:
        """Compute activations again in the backward pass instead of keeping them, or do not."""

    def set_patch_dropout(self, share: float) -> None:
        """Leave out a share in [0, 1) of an image's patches in training (FLIP, Li et al. 2023).

        Raises:
            ConfigError: the image tower has no patches to leave out.
        """

    def untrained_parameters(self, *, unimodal: bool, patches: bool) -> list[nn.Parameter]:
        """Return what no gradient reaches in a kind of training.

        Args:
            unimodal: Whether the second head is trained.
            patches: Whether patches are hidden.
        """

    def image_groups(self) -> list[list[nn.Parameter]]:
        """Return the image side's parameters from the input to the output, a list a stage."""

    def text_groups(self) -> list[list[nn.Parameter]]:
        """Return the text side's parameters from the input to the output, a list a stage."""
