"""`Embedder`: images and texts to unit vectors of one space, in input order."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vlm.bundle import Bundle, load_bundle
from vlm.calibration import Calibration
from vlm.errors import VlmError
from vlm.images.decoding import ImageSource, decode_image
from vlm.models.encoder import Encoder
from vlm.text.tokenizer import Tokenizer

Item = TypeVar("Item")


class Embedder:
    """Turns images and texts into float32 unit vectors whose products are cosines.

    Args:
        model: The encoder; it is used as it is, on the device where it lies.
        tokenizer: The tokenizer it was trained with.
        transform: Maps an RGB image to the tensor it was trained on.
        fingerprint: Names all that vectors depend on; those with one fingerprint can be compared.
        languages: Languages of the training captions.
        matryoshka: Widths below the model's own at which its features were trained as well.
        truncate_dim: Use only so many first numbers of each feature; None for all.
        calibration: What the cosine of a text and an image says of a match, where fitted.

    Raises:
        VlmError: the features were not trained at the width asked for.
    """

    def __init__(
        self,
        model: Encoder,
        tokenizer: Tokenizer,
        transform: Callable[[Image.Image], Float[Tensor, "3 height width"]],
        *,
        fingerprint: str = "",
        languages: Sequence[str] = (),
        matryoshka: Sequence[int] = (),
        truncate_dim: int | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        widths = sorted({*matryoshka, model.embed_dim})
        if truncate_dim is not None and truncate_dim not in widths:
            raise VlmError(
                f"truncate_dim is {truncate_dim}; expected {' or '.join(map(str, widths))}, the "
                "widths at which the model's features were trained"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.transform = transform
        self.fingerprint = fingerprint
        self.languages = tuple(languages)
        self.matryoshka = tuple(matryoshka)
        self.calibration = calibration
        self.transform_cfg: Mapping[str, Any] = {}
        """open_clip's description of the image transform; empty where it is not of a bundle."""
        self.embed_dim = truncate_dim or model.embed_dim
        """Length of the vectors."""

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
            truncate_dim: Use only so many first numbers of each feature, one of the widths at
                which they were trained (Matryoshka); None for all.

        Raises:
            CheckpointError: the folder is not a bundle, or it is damaged.
            VlmError: there is no such device, or it has no room for the model, or the features were
                not trained at that width.
        """
        return cls.of_bundle(load_bundle(Path(folder)), device=device, truncate_dim=truncate_dim)

    @classmethod
    def of_bundle(
        cls,
        bundle: Bundle,
        *,
        device: str | torch.device | None = None,
        truncate_dim: int | None = None,
    ) -> "Embedder":
        """Use a bundle that has been read; its model moves to the device.

        Raises:
            VlmError: there is no such device, or it has no room for the model, or the features were
                not trained at that width.
        """
        place = _usable(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            model = bundle.model.to(place)
        except torch.OutOfMemoryError as error:
            raise VlmError(f"the model does not fit into the free memory of {place}") from error
        embedder = cls(
            model,
            bundle.tokenizer,
            bundle.transform,
            fingerprint=bundle.fingerprint,
            languages=bundle.languages,
            matryoshka=bundle.truncate_dims,
            truncate_dim=truncate_dim,
            calibration=bundle.calibration,
        )
        embedder.transform_cfg = bundle.preprocess_cfg
        return embedder

    def truncated(self, dim: int) -> "Embedder":
        """Return an embedder of the same model whose vectors have `dim` numbers.

        Raises:
            VlmError: the features were not trained at that width.
        """
        embedder = Embedder(
            self.model,
            self.tokenizer,
            self.transform,
            fingerprint=self.fingerprint,
            languages=self.languages,
            matryoshka=self.matryoshka,
            truncate_dim=dim,
            calibration=self.calibration,
        )
        embedder.transform_cfg = self.transform_cfg
        return embedder

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.log_logit_scale.device

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
        if self.calibration is None:
            raise VlmError(
                "the bundle is not calibrated; `vlm eval calibrate BUNDLE` fits and stores what "
                "its cosines say of a match"
            )
        if self.calibration.dim != self.embed_dim:
            raise VlmError(
                f"the bundle is calibrated for vectors of {self.calibration.dim} numbers, not of "
                f"{self.embed_dim}; calibrate it with --truncate_dim {self.embed_dim}"
            )
        return self.calibration.probability(self.similarity(queries, candidates), prior=prior)

    def _pixels(
        self, images: Sequence[str | ImageSource], first: int
    ) -> Float[Tensor, "images 3 h w"]:
        """Decode images, of which the first is called by the number `first` + 1 in an error."""
        decoded = [
            decode_image(Path(image) if isinstance(image, str) else image, name=f"image {number}")
            for number, image in enumerate(images, start=first + 1)
        ]
        return torch.stack([self.transform(image) for image in decoded]).to(self.device)

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
        was_training = self.model.training
        self.model.eval()
        starts = range(0, len(items), batch_size)
        silent = not show_progress_bar
        try:
            with tqdm(starts, unit="batch", desc="embedding", disable=silent) as progress:
                rows = [
                    self._cut(encode(items[start : start + batch_size], start)).cpu().numpy()
                    for start in progress
                ]
        finally:
            self.model.train(was_training)
        return np.concatenate(rows) if rows else np.zeros((0, self.embed_dim), np.float32)

    def _cut(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch cut"]:
        if features.shape[1] == self.embed_dim:
            return features
        return F.normalize(features[:, : self.embed_dim], dim=-1)


def _usable(device: str | torch.device) -> torch.device:
    """Return the device, after something was put there: torch's own words on a wrong one are many.

    Raises:
        VlmError: there is no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise VlmError(f"cannot use the device {device}; expected {' or '.join(here)}") from error


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what is no list of strings; of one string alone the letters would be embedded.

    Raises:
        VlmError: `texts` is a string, or holds something else than strings.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise VlmError(f"encode_text takes a list of strings, not {texts!r:.60}")
