"""`BulkEmbedder`: all vectors of a benchmark on every rank, kept on disk as it goes."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float32, Shaped
from numpy.typing import DTypeLike, NDArray
from PIL import Image
from tqdm import tqdm

from vlm.distributed.gather import gather_numbers, gather_rows
from vlm.distributed.groups import SINGLE, RankGroup
from vlm.embedding.embedder import Embedder, check_texts
from vlm.embedding.parts import npy_bytes
from vlm.errors import DataError, DistributedError, VlmError
from vlm.files import write_file
from vlm.images.decoding import ImageSource, decode_image

# A part is what a killed run loses, what ranks share out among them, and one file: seconds of work
# and a few megabytes. Both are multiples of the embedder's batches.
IMAGES_A_PART, TEXTS_A_PART = 1 << 10, 1 << 12

Kind = Literal["images", "texts"]
Result = TypeVar("Result")

_KEY_VERSION = 2  # to be raised when the same model comes to give other vectors
_DIGEST_SIZE = hashlib.sha256().digest_size


class BulkEmbedder:
    """Embeds for an evaluation: over the ranks of a group, gathered on all, and kept on disk.

    The work is cut into parts, and part p belongs to rank p % size; every rank ends up with all
    vectors. Every rank must call the same methods with the same arguments. What fails on one rank
    fails on all: the others raise a `DataError` with the words of a `VlmError`, and of any other
    exception a `DistributedError` that names it.

    In the cache, a part is the file `MODEL/PART.npy`. MODEL names the bundle and the width; PART
    names the images or texts themselves, in their order, so that whatever asks for the same ones
    in the same order finds them again, and an interrupted run goes on with what is missing. A file
    that is no such array is made anew. The names do not depend on the device or the number of
    threads, with which vectors differ by rounding.

    Args:
        embedder: The model.
        cache: Folder to keep vectors in; it can belong to each machine or to all. None keeps none.
        group: The ranks to share the work with.
        show_progress_bar: Whether the first rank shows progress on stderr.

    Raises:
        VlmError: there is a cache, and the embedder does not say by which names to keep vectors.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        cache: Path | None = None,
        group: RankGroup = SINGLE,
        show_progress_bar: bool = False,
    ) -> None:
        if cache is not None and not embedder.fingerprint:
            raise VlmError(
                f"cannot keep vectors in {cache}: the embedder has no fingerprint; expected one "
                "that was read from a bundle"
            )
        self.embedder = embedder
        self.cache = cache
        self.group = group
        self.show_progress_bar = show_progress_bar and group.rank == 0

    def digests_of(self, images: Sequence[ImageSource]) -> list[bytes]:
        """Return the SHA-256 of each image, as `digest_of_image` does; ranks share the reading."""

        def digest(part: slice) -> _Done:
            joined = b"".join(digest_of_image(image) for image in images[part])
            return _Done(np.frombuffer(bytearray(joined), np.uint8).reshape(-1, _DIGEST_SIZE))

        rows = self._all_rows(
            (len(images), _DIGEST_SIZE), np.uint8, IMAGES_A_PART, digest, "reading images"
        )
        return [row.tobytes() for row in rows]

    def encode_image(
        self, images: Sequence[ImageSource], digests: Sequence[bytes] | None = None
    ) -> Float32[np.ndarray, "images dim"]:
        """Embed images, and gather the unit vectors on every rank.

        Args:
            images: Paths, open PIL images, or the bytes of image files.
            digests: What `digests_of` gave for them, where it was asked already; they are needed
                for a cache only.

        Raises:
            DataError: an image cannot be read (on every rank).
            VlmError: the disk is full (on every rank), or there are not as many digests.
        """
        if digests is not None and len(digests) != len(images):
            raise VlmError(f"found {len(digests)} digests of {len(images)} images")
        if self.cache is not None and digests is None:
            digests = self.digests_of(images)

        def encode(part: slice) -> _Done:
            def make() -> NDArray[np.float32]:
                return self.embedder.encode_image(images[part], first_number=part.start + 1)

            return self._find_or_make("images", digests[part] if digests else (), make)

        shape = len(images), self.embedder.embed_dim
        return self._all_rows(shape, np.float32, IMAGES_A_PART, encode, "embedding images")

    def encode_text(self, texts: Sequence[str]) -> Float32[np.ndarray, "texts dim"]:
        """Embed texts in any language, and gather the unit vectors on every rank.

        Raises:
            VlmError: not all are strings; or the disk is full (on every rank).
        """
        check_texts(texts)

        def encode(part: slice) -> _Done:
            chunk, digests = texts[part], list[bytes]()
            if self.cache is not None:
                digests = [_sha256(text.encode("utf-8", "surrogatepass")) for text in chunk]
            return self._find_or_make("texts", digests, lambda: self.embedder.encode_text(chunk))

        shape = len(texts), self.embedder.embed_dim
        return self._all_rows(shape, np.float32, TEXTS_A_PART, encode, "embedding texts")

    def _find_or_make(
        self, kind: Kind, digests: Sequence[bytes], make: Callable[[], NDArray[np.float32]]
    ) -> "_Done":
        """Return the vectors of a part from the cache, or make them and keep them there."""
        if self.cache is None or not digests:
            return _Done(make())
        part = _sha256(kind.encode() + b"".join(digests)).hex()
        path = self.cache / _model_key(self.embedder, kind) / f"{part}.npy"
        found = _read(path, (len(digests), self.embedder.embed_dim))
        if found is not None:
            return _Done(found, len(found))
        vectors = make()
        # Another run may be writing the same part, and have put the file in its place first.
        with suppress(FileNotFoundError):
            write_file(path, npy_bytes(vectors))
        return _Done(vectors)

    def _all_rows(
        self,
        shape: tuple[int, int],
        dtype: DTypeLike,
        part_size: int,
        work: Callable[[slice], "_Done"],
        what: str,
    ) -> Shaped[np.ndarray, "count width"]:
        """Give each rank a part, and all ranks the rows, until there are as many as asked for."""
        count, found, device = shape[0], 0, self._exchange_device()
        rows: NDArray[Any] = self._on_every_rank(lambda: np.empty(shape, dtype))
        starts = range(0, count, part_size * self.group.size)
        with tqdm(total=count, desc=what, disable=not self.show_progress_bar) as bar:
            for start in starts:
                # Beyond the end parts are empty; a rank without work is a rank with such a part.
                edges = [
                    min(start + part_size * place, count) for place in range(self.group.size + 1)
                ]
                part = slice(*edges[self.group.rank : self.group.rank + 2])
                done = self._on_every_rank(partial(work, part))
                own = torch.from_numpy(done.rows).to(device)
                received = gather_rows(own, self.group, np.diff(edges).tolist())
                rows[edges[0] : edges[-1]] = received.cpu().numpy()
                found += sum(n for (n,) in gather_numbers([done.of_cache], self.group, device))
                if found:
                    bar.set_postfix_str(f"{found} from the cache", refresh=False)
                bar.update(len(received))
        return rows

    def _on_every_rank(self, work: Callable[[], Result]) -> Result:
        """Return what the work gives here; where it fails on one rank, raise on all.

        A rank that raised alone would leave the others waiting for its rows.
        """
        device = self._exchange_device()
        try:
            result = work()
        except Exception as error:
            _share_error(error, self.group, device)
            raise
        _share_error(None, self.group, device)
        return result

    def _exchange_device(self) -> torch.device:
        # gloo sends tensors of the CPU only.
        if self.group.size == 1 or dist.get_backend(self.group.process_group) == "gloo":
            return torch.device("cpu")
        return self.embedder.device


def digest_of_image(image: ImageSource) -> bytes:
    """Return the SHA-256 of an encoded image, or of the RGB pixels of an opened one.

    Of an opened one it is what models see: upright, on white, and with its palette's colours.

    Raises:
        DataError: the file cannot be read, or the opened image is damaged.
    """
    if isinstance(image, Image.Image):
        seen = decode_image(image)
        return _sha256(f"{seen.mode} {seen.size}".encode() + seen.tobytes())
    if isinstance(image, bytes):
        return _sha256(image)
    try:
        return _sha256(image.read_bytes())
    except OSError as error:
        raise DataError(f"{image} cannot be read: {error.strerror or error}") from error


class _Done(NamedTuple):
    rows: Shaped[np.ndarray, "rows width"]
    of_cache: int = 0  # how many of the rows came from the cache


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    """Return the array of a file; None if it is missing, damaged or of another shape."""
    try:
        content = io.BytesIO(path.read_bytes())
        found: NDArray[Any] = np.lib.format.read_array(content, allow_pickle=False)
    except (OSError, EOFError, ValueError, MemoryError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def _model_key(embedder: Embedder, kind: Kind) -> str:
    images, texts = dict(embedder.bundle.preprocess_cfg), embedder.tokenizer.fingerprint
    content = {
        "version": _KEY_VERSION,
        "model": embedder.fingerprint,
        "dim": embedder.embed_dim,
        kind: images if kind == "images" else texts,
    }
    return _sha256(json.dumps(content, sort_keys=True).encode()).hex()


def _share_error(error: Exception | None, group: RankGroup, device: torch.device) -> None:
    """Exchange what each rank met; a rank that met nothing raises what the first one met."""
    of_user = isinstance(error, VlmError)
    in_one_line = ": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())]))
    words = str(error) if of_user else f"rank {group.rank} met {in_one_line}"
    message = b"" if error is None else words.encode("utf-8", "surrogatepass")
    outcomes = gather_numbers([error is not None, of_user, len(message)], group, device)
    failed = [rank for rank, (wrong, _, _) in enumerate(outcomes) if wrong]
    if not failed:
        return
    own = torch.tensor(list(message), dtype=torch.uint8, device=device)
    messages = bytes(gather_rows(own, group, [size for _, _, size in outcomes]).tolist())
    if error is None:
        _, first_of_user, size = outcomes[failed[0]]  # ranks before it have sent nothing
        kind = DataError if first_of_user else DistributedError
        raise kind(messages[:size].decode("utf-8", "surrogatepass"))


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
