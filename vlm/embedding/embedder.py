"""`Embedder`: images and texts to unit vectors of one space, in input order."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from vlm.bundle import Bundle, load_bundle
from vlm.errors import VlmError
from vlm.images.decoding import ImageSource, decode_image
from vlm.text.tokenizer import TokenBatch

Item = TypeVar("Item")


@runtime_checkable
class RuntimeEncoder(Protocol):
    """What an `Embedder` runs: a module of torch, or anything else with these four members."""

    @property
    def embed_dim(self) -> int:
        """Width of the common space."""

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""

    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each image."""

    def encode_text(self, tokens: TokenBatch) -> Float[Tensor, "batch dim"]:
        """Return a float32 unit vector for each text."""


class Embedder:
    """Turns images and texts into float32 unit vectors whose products are cosines.

    Args:
        bundle: The model with its tokenizer and image transform.
        model: What runs in place of the bundle's own model, such as one in training.
        device: Where to run it, which moves the model; None leaves it where it is.
        truncate_dim: Keep only the first N dimensions (a Matryoshka width of the model); None
            keeps all.

    Raises:
        VlmError: the features were not trained at that width, there is no such device, or it has
            no room for the model.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        model: RuntimeEncoder | None = None,
        device: str | torch.device | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        self.bundle = bundle
        self.model: RuntimeEncoder = bundle.model if model is None else model
        self.tokenizer = bundle.tokenizer
        self.languages = bundle.languages
        """Languages of the training captions."""
        self.fingerprint = bundle.fingerprint
        """Names all that vectors depend on: two embedders with one fingerprint give the same."""
        widths = sorted({*bundle.truncate_dims, self.model.embed_dim})
        if truncate_dim is not None and truncate_dim not in widths:
            raise VlmError(
                f"truncate_dim is {truncate_dim}; expected {' or '.join(map(str, widths))}, the "
                "widths at which the model's features were trained"
            )
        self.embed_dim = truncate_dim or self.model.embed_dim
        """Length of the vectors."""
        if device is not None:
            _move(self.model, device)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        truncate_dim: int | None = None,
    ) -> "Embedder":
        """Read a bundle.

        Args:
            folder: The bundle, for example `runs/quickstart/bundle`.
            device: Where to run it; a GPU if there is one, else the CPU.
            truncate_dim: As for the class.

        Raises:
            CheckpointError: the folder is not a bundle, or it is damaged.
            VlmError: as for the class.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_bundle(Path(folder)), device=device, truncate_dim=truncate_dim)

    def truncated(self, dim: int) -> "Embedder":
        """Return an embedder of the same model whose vectors have `dim` numbers.

        Raises:
            VlmError: the features were not trained at that width.
        """
        return Embedder(self.bundle, model=self.model, truncate_dim=dim)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def encode_text(
        self, texts: Sequence[str], *, batch_size: int = 256, show_progress_bar: bool = False
    ) -> Float32[np.ndarray, "texts dim"]:
        """Embed texts in any language.

        Args:
            texts: The texts; one string alone is refused, as its letters would be embedded.
            batch_size: Texts encoded at a time; it does not change the result.
            show_progress_bar: Whether to show progress on stderr.

        Returns:
            One unit vector a text, in order.

        Raises:
            VlmError: `texts` is a string, or holds something else than strings.
        """
        check_texts(texts)
        return self._encode(
            texts,
            lambda chunk, _: self.model.encode_text(self.tokenizer.encode(chunk).to(self.device)),
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )

    def encode_image(
        self,
        images: Sequence[str | ImageSource],
        *,
        batch_size: int = 64,
        show_progress_bar: bool = False,
    ) -> Float32[np.ndarray, "images dim"]:
        """Embed images.

        Args:
            images: Paths, open PIL images, or the bytes of JPEG, PNG or WebP files.
            batch_size: Images encoded at a time; it does not change the result.
            show_progress_bar: Whether to show progress on stderr.

        Returns:
            One unit vector an image, in order.

        Raises:
            DataError: an image cannot be read.
            VlmError: `images` is one path instead of a list.
        """
        if isinstance(images, str | Path | bytes | Image.Image):
            raise VlmError("encode_image takes a list of images, not one image")
        return self._encode(
            images,
            lambda chunk, first: self.model.encode_image(self._pixels(chunk, first)),
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )

    def similarity(
        self,
        queries: Float32[np.ndarray, "queries query_dim"],
        candidates: Float32[np.ndarray, "candidates candidate_dim"],
    ) -> Float32[np.ndarray, "queries candidates"]:
        """Return the cosine of every query with every candidate, in [-1, 1].

        Raises:
            VlmError: they are vectors of different widths.
        """
        if queries.shape[1] != candidates.shape[1]:
            raise VlmError(
                f"cannot compare vectors of {queries.shape[1]} numbers with vectors of "
                f"{candidates.shape[1]}; expected one width"
            )
        cosines: NDArray[np.float32] = queries @ candidates.T
        return cosines

    def match_probability(
        self,
        queries: Float32[np.ndarray, "queries query_dim"],
        candidates: Float32[np.ndarray, "candidates candidate_dim"],
        *,
        prior: float | None = None,
    ) -> Float32[np.ndarray, "queries candidates"]:
        """Return the probability in [0, 1] that a text and an image match, for every pair.

        Args:
            queries: Vectors of texts, or of images.
            candidates: Vectors of the other kind; the map was fitted on pairs of both kinds.
            prior: Share of matching pairs among those asked about; None for the one that the
                bundle was calibrated for.

        Raises:
            VlmError: the bundle is not calibrated, or at another width; the prior is no share; or
                queries and candidates are of different widths.
        """
        calibration = self.bundle.calibration
        if calibration is None:
            raise VlmError(
                "the bundle is not calibrated; `vlm eval calibrate BUNDLE` fits and stores what "
                "its cosines say of a match"
            )
        if calibration.dim != self.embed_dim:
            raise VlmError(
                f"the bundle is calibrated for vectors of {calibration.dim} numbers, not of "
                f"{self.embed_dim}; calibrate it with --truncate_dim {self.embed_dim}"
            )
        return calibration.probability(self.similarity(queries, candidates), prior=prior)

    def _pixels(
        self, images: Sequence[str | ImageSource], first: int
    ) -> Float[Tensor, "images 3 h w"]:
        """Decode images, of which the first is called by the number `first` + 1 in an error."""
        decoded = [
            decode_image(Path(image) if isinstance(image, str) else image, name=f"image {number}")
            for number, image in enumerate(images, start=first + 1)
        ]
        return torch.stack([self.bundle.transform(image) for image in decoded]).to(self.device)

    @torch.inference_mode()
    def _encode(
        self,
        items: Sequence[Item],
        encode: Callable[[Sequence[Item], int], Tensor],
        *,
        batch_size: int,
        show_progress_bar: bool,
    ) -> NDArray[np.float32]:
        if batch_size < 1:
            raise VlmError(f"batch_size is {batch_size}; expected at least 1")
        starts = range(0, len(items), batch_size)
        silent = not show_progress_bar
        with (
            _evaluating(self.model),
            tqdm(starts, unit="batch", desc="embedding", disable=silent) as progress,
        ):
            rows = [
                self._cut(encode(items[start : start + batch_size], start)).cpu().numpy()
                for start in progress
            ]
        return np.concatenate(rows) if rows else np.zeros((0, self.embed_dim), np.float32)

    def _cut(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch cut"]:
        if features.shape[1] == self.embed_dim:
            return features
        return F.normalize(features[:, : self.embed_dim], dim=-1)


def _move(model: RuntimeEncoder, device: str | torch.device) -> None:
    """Move a module to a device; what is no module stays where it is.

    Raises:
        VlmError: there is no such device, or it has no room for the model.
    """
    try:
        # Something small first: torch's own words on a wrong device are many.
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise VlmError(f"cannot use the device {device}; expected {' or '.join(here)}") from error
    try:
        if isinstance(model, nn.Module):
            model.to(place)
    except torch.OutOfMemoryError as error:
        raise VlmError(f"the model does not fit into the free memory of {place}") from error


@contextmanager
def _evaluating(model: RuntimeEncoder) -> Iterator[None]:
    """Run a module in evaluation mode, and leave it in the mode it was in."""
    if not isinstance(model, nn.Module):
        yield
        return
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what is no list of strings; of one string alone the letters would be embedded.

    Raises:
        VlmError: `texts` is a string, or holds something else than strings.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise VlmError(f"encode_text takes a list of strings, not {texts!r:.60}")
