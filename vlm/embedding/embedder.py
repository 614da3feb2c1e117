"""`Embedder`: images and texts to unit vectors of one space, in input order."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

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

IMAGE_BATCH = 64
"""Images encoded at a time."""

ImageInput = str | ImageSource | NDArray[Any] | io.BufferedIOBase
"""What `Embedder.encode_image` takes for an image."""

Item = TypeVar("Item")
Input = TypeVar("Input")

_LONE = (str, bytes, Path, Image.Image, io.IOBase)


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
        VlmError: the features were not trained at that width, or the device cannot be used.
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
        """Read a bundle such as `runs/quickstart/bundle`; None is a GPU if there is one.

        Raises:
            CheckpointError: the folder is not a bundle, or it is damaged.
            VlmError: as for the class.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_bundle(Path(folder)), device=device, truncate_dim=truncate_dim)

    def truncated(self, dim: int) -> "Embedder":
        """Return an embedder of the same model whose vectors have `dim` numbers."""
        return Embedder(self.bundle, model=self.model, truncate_dim=dim)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    def encode_text(
        self, texts: str | Iterable[str], *, batch_size: int = 256, show_progress_bar: bool = False
    ) -> Float32[np.ndarray, "*texts dim"]:
        """Embed texts in any language: one unit vector a text, or the vector of one text alone.

        `batch_size`, the number of texts encoded at a time, does not change the result.

        Raises:
            VlmError: something is not a string, or a vector is not finite.
        """
        if isinstance(texts, str):
            return np.asarray(self.encode_text([texts])[0])
        texts = _listed(texts, "strings")
        check_texts(texts)
        rows = [np.zeros((0, self.embed_dim), np.float32)]
        for _, chunk in _batches(texts, batch_size, show_progress_bar):
            tokens = self.tokenizer.encode(chunk).to(self.device)
            rows.append(self._vectors(self.model.encode_text, tokens))
        return np.concatenate(rows)

    def encode_image(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = IMAGE_BATCH,
        show_progress_bar: bool = False,
        first_number: int = 1,
    ) -> Float32[np.ndarray, "*images dim"]:
        """Embed images: one unit vector an image, or the vector of one image alone.

        Args:
            images: Paths, open PIL images, arrays of uint8 (height x width x 3), open files, or
                the bytes of image files; or one of these.
            batch_size: Images encoded at a time; it does not change the result.
            show_progress_bar: Whether to show progress on stderr.
            first_number: The number by which an error calls the first image.

        Raises:
            DataError: an image cannot be read.
            VlmError: something is not an image, or a vector is not finite.
        """
        if isinstance(images, _LONE) or (isinstance(images, np.ndarray) and images.ndim < 4):
            return np.asarray(self.encode_image([cast(ImageInput, images)])[0])
        rows = [np.zeros((0, self.embed_dim), np.float32)]
        for start, chunk in _batches(_listed(images, "images"), batch_size, show_progress_bar):
            numbered = enumerate(chunk, start=start + first_number)
            pixels = [self.pixels(image, name=f"image {number}") for number, image in numbered]
            rows.append(self.encode_pixels(torch.stack(pixels)))
        return np.concatenate(rows)

    def pixels(
        self, image: ImageInput, *, name: str = "the image"
    ) -> Float[Tensor, "3 height width"]:
        """Decode an image into what the model reads; errors call it `name` if it has no path.

        Raises:
            DataError: it cannot be read.
            VlmError: it is not an image.
        """
        return self.bundle.transform(decode_image(_source_of(image), name=name))

    def encode_pixels(
        self, pixels: Float[Tensor, "images 3 height width"]
    ) -> Float32[np.ndarray, "images dim"]:
        """Embed a batch of what `pixels` returned."""
        return self._vectors(self.model.encode_image, pixels.to(self.device))

    def similarity(
        self,
        queries: Float32[np.ndarray, "*queries query_dim"],
        candidates: Float32[np.ndarray, "*candidates candidate_dim"],
    ) -> Float32[np.ndarray, "*pairs"]:
        """Return the cosine of every query with every candidate, in [-1, 1].

        Either side may be one vector; its axis is then missing in the result.
        """
        queries, candidates = np.asarray(queries), np.asarray(candidates)
        if queries.shape[-1] != candidates.shape[-1]:
            raise VlmError(
                f"cannot compare vectors of {queries.shape[-1]} numbers with vectors of "
                f"{candidates.shape[-1]}; expected one width"
            )
        return np.asarray(queries @ candidates.T)

    def match_probability(
        self,
        queries: Float32[np.ndarray, "*queries query_dim"],
        candidates: Float32[np.ndarray, "*candidates candidate_dim"],
        *,
        prior: float | None = None,
    ) -> Float32[np.ndarray, "*pairs"]:
        """Return the probability in [0, 1] that a text and an image match, for every pair.

        Args:
            queries: Vectors of texts, or of images.
            candidates: Vectors of the other kind; the map was fitted on pairs of both kinds.
            prior: Ratio of matching pairs among those asked about; None for the one that the
                bundle was calibrated for.

        Raises:
            VlmError: the bundle is not calibrated, or at another width; or the prior is not
                between 0 and 1.
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

    @torch.inference_mode()
    def _vectors(self, encode: Callable[[Input], Tensor], inputs: Input) -> NDArray[np.float32]:
        module = self.model if isinstance(self.model, nn.Module) else nn.Module()
        was_training = module.training
        module.eval()
        try:
            features = encode(inputs)
        finally:
            module.train(was_training)  # a model in training goes on as it was
        if features.shape[1] != self.embed_dim:
            features = F.normalize(features[:, : self.embed_dim], dim=-1)
        vectors: NDArray[np.float32] = features.cpu().numpy()
        if not np.isfinite(vectors).all():
            raise VlmError("the model gives vectors that are not finite; its weights are damaged")
        return vectors


def _batches(
    items: Sequence[Item], size: int, show_progress_bar: bool
) -> Iterator[tuple[int, Sequence[Item]]]:
    """Give the items in batches, each with the position of its first."""
    if size < 1:
        raise VlmError(f"batch_size is {size}; expected at least 1")
    starts = range(0, len(items), size)
    with tqdm(starts, unit="batch", desc="embedding", disable=not show_progress_bar) as progress:
        for start in progress:
            yield start, items[start : start + size]


def _source_of(image: ImageInput) -> ImageSource:
    if isinstance(image, str):
        if "://" in image:
            raise VlmError(f"{image} is a URL; expected a path: download it, or pass its bytes")
        return Path(image)
    if isinstance(image, np.ndarray):
        colours = image.shape[2:] in ((), (3,), (4,))
        if image.dtype != np.uint8 or image.ndim < 2 or not colours or not image.size:
            raise VlmError(
                f"an array of {image.dtype} and shape {image.shape} is not an image; expected "
                "uint8 of height x width x 3"
            )
        return Image.fromarray(image)
    if isinstance(image, Path | bytes | Image.Image):
        return image
    content = image.read() if hasattr(image, "read") else None
    if not isinstance(content, bytes):
        raise VlmError(
            f"an object of type {type(image).__name__} is not an image; expected a path, bytes, a "
            "PIL image or an array of uint8"
        )
    return content


def _listed(items: Iterable[Item], kind: str) -> Sequence[Item]:
    if not isinstance(items, Iterable):
        raise VlmError(f"expected {kind}, found an object of type {type(items).__name__}")
    return items if isinstance(items, Sequence) else list(items)


def _move(model: RuntimeEncoder, device: str | torch.device) -> None:
    """Move a module to a device; what is no module stays where it is."""
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


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what is not a list of strings."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise VlmError(f"expected a list of strings, found {texts!r:.60}")
